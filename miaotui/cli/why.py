"""Shows an explanation, and warnings about the input, to a person at a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

# From hardly anything to most; for the answer, and against it.
_FOR = ("", "on color(22)", "on color(28)", "bold on color(34)")
_AGAINST = ("", "on color(52)", "on color(88)", "bold on color(124)")
_MOST_WORDS = 8


def show_warnings(console: Console, warnings: list[dict[str, Any]]) -> None:
    """Prints what is unusual about question or passage."""
    for warning in warnings:
        text = f"   ! {warning['message']} ({warning['kind']}, {warning['score']:.2f})"
        console.print(text, style="yellow", highlight=False, markup=False)


def show_why(console: Console, why: dict[str, Any], question: str, context: str) -> None:
    """Prints the words by what they did, the sum, and what else the answer might have been.

    `context`: the passage that the explanation's offsets are of.
    """
    words = why["words"]
    most = max((abs(word["attribution"]) for word in words), default=0.0) or 1.0
    parts: list[RenderableType] = [Text("why", style="bold cyan")]
    for part, text in (("question", question), ("context", context)):
        parts.append(_heat(text, [word for word in words if word["part"] == part], most))
    strongest = sorted(words, key=lambda word: -abs(word["attribution"]))[:_MOST_WORDS]
    listed = ", ".join(f"{word['text']} {word['attribution']:+.2f}" for word in strongest)
    complete = why["completeness"]
    parts += [
        Text(f"strongest: {listed}", style="dim"),
        Text(
            f"they add up to {complete['sum']:.2f}: the answer's logit {complete['logit']:.2f} "
            f"minus {complete['baseline_logit']:.2f} without words, off by {complete['gap']:+.3f} "
            f"({why['steps']} points)",
            style="dim",
        ),
    ]
    for other in why["runners_up"][:3]:
        parts.append(Text(f"or: {other['text']}   {other['margin']:.2f} below", style="dim"))
    parts += [Text(note, style="dim italic") for note in why["notes"]]
    console.print(Padding(Group(*parts), (0, 0, 1, 3)), highlight=False)


def _heat(text: str, words: list[dict[str, Any]], most: float) -> Text:
    """A text with its words marked, from the first that has a value to the last."""
    shown = Text()
    if not words:
        return shown
    place = words[0]["start"]
    for word in words:
        shown.append(text[place : word["start"]])
        share = word["attribution"] / most
        shades = _FOR if share > 0 else _AGAINST
        level = sum(abs(share) >= bound for bound in (0.1, 0.3, 0.6))
        shown.append(text[word["start"] : word["end"]], style=shades[level])
        place = word["end"]
    return shown
