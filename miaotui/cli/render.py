"""Shows an answer to a person."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from miaotui.cli.asking import Reply
from miaotui.cli.demo import Asked
from miaotui.cli.why import show_warnings, show_why

_SENTENCE_END = re.compile(r"[.!?](?=\s)|[。！？\n]")
# A "sentence" may be a whole page of text without a full stop.
_MOST_CONTEXT = 160


def show_reply(console: Console, asked: Asked, reply: Reply) -> None:
    """Prints the question, the answers in their sentences, and where the time went."""
    body = reply.body
    parts: list[RenderableType] = [_labelled("Q", "bold cyan", Text(asked.question))]
    if not body["answerable"]:
        whose = "your documents do" if "collection" in body else "the passage does"
        text = Text(f"{whose} not say", style="italic")
        text.append(f"   (no-answer score {body['no_answer_score']:+.2f})", style="dim")
        parts.append(_labelled("A", "bold yellow", text))
    for rank, answer in enumerate(body["answers"]):
        best = rank == 0 and body["answerable"]
        style = "bold green" if best else "green"
        text = Text(answer["text"], style=style)
        text.append(
            f"   score {answer['score']:.3f}, characters {answer['start']}–{answer['end']}",
            style="dim",
        )
        parts.append(_labelled("A" if best else str(rank + 1), style, text))
        if best:
            parts.append(Padding(_sentence(asked, body, answer), (0, 0, 0, 3)))
        if "source" in answer:
            parts.append(Padding(_source(answer), (0, 0, 0, 3)))
    console.print(Group(*parts), highlight=False)
    show_warnings(console, body.get("warnings", []))
    if why := body.get("explanation"):
        passage = body["passages"][why["passage"]]["text"] if "passages" in body else asked.context
        show_why(console, why, asked.question, passage)
    console.print(Padding(_timings(body, reply.milliseconds), (1, 0, 0, 3)))
    console.print(
        f"   model {body['model']} ({body['model_fingerprint'][:12]}), cache {body['cache']}, "
        f"trace {body['trace_id'] or '-'}\n",
        style="dim",
        highlight=False,
    )


def _sentence(asked: Asked, body: dict[str, Any], answer: dict[str, Any]) -> Text:
    """The answer's sentence, out of the passage asked about or of the document's passage."""
    if "source" not in answer:
        return highlight(asked.context, answer["start"], answer["end"])
    passage = body["passages"][answer["passage"]]
    begin = passage["start"]
    return highlight(passage["text"], answer["start"] - begin, answer["end"] - begin)


def _source(answer: dict[str, Any]) -> Text:
    """Where in which document the answer stands."""
    parts = [answer["source"]]
    if answer["page"] is not None:
        parts.append(f"page {answer['page']}")
    if answer["heading"]:
        parts.append(answer["heading"])
    return Text(", ".join(parts), style="cyan")


def highlight(context: str, start: int, end: int) -> Text:
    """The sentence around characters `start` to `end`, these marked."""
    left = max((m.end() for m in _SENTENCE_END.finditer(context, 0, start)), default=0)
    after = _SENTENCE_END.search(context, max(end - 1, start))
    right = after.end() if after else len(context)
    left = max(left, start - _MOST_CONTEXT)
    right = min(right, end + _MOST_CONTEXT)
    text = Text("… " if left > 0 and not _ends_sentence(context, left) else "")
    text.append(context[left:start].lstrip())
    text.append(context[start:end], style="bold black on green")
    text.append(context[end:right].rstrip())
    return text


def _ends_sentence(context: str, position: int) -> bool:
    return _SENTENCE_END.match(context, position - 1) is not None


def _labelled(label: str, style: str, text: Text) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=2, justify="right", style=style)
    table.add_column()
    table.add_row(label, text)
    return table


def _timings(body: dict[str, Any], milliseconds: float) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("where the time went")
    table.add_column("ms", justify="right")
    for timing in body["timings"]:
        table.add_row(timing["hop"], f"{timing['milliseconds']:.2f}")
    table.add_row("as the caller saw it", f"{milliseconds:.2f}", style="bold")
    return table
