"""The command `miaotui probe`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from miaotui.cli.asking import DEFAULT_URL
from miaotui.cli.shared import Json, Key, Url, fail

if TYPE_CHECKING:
    from miaotui.client import Client
    from miaotui.robustness.perturbations import Item
    from miaotui.robustness.probe import Outcome, Report

_BATCH = 100

EPILOG = """[bold]Examples[/]

  miaotui probe                          a dozen built-in questions, English and Chinese

  miaotui probe dev.json --limit 200     questions of your own, in SQuAD's format

  miaotui probe --json > robustness.json"""


def register(app: typer.Typer) -> None:
    """Adds the command to `miaotui`."""
    app.command("probe", epilog=EPILOG)(probe_command)


def probe_command(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="Questions in SQuAD's format; without it, built-in ones.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most questions of the file.")] = 100,
    seed: Annotated[int, typer.Option(help="Equal seeds disturb alike.")] = 0,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 30.0,
) -> None:
    """Show how well a running Miaotui's answers stand disturbances.

    Asks every question as it is and disturbed: typos, swapped words, distracting sentences,
    invisible characters, homoglyphs, full-width forms; in Chinese also characters of like shape
    or sound and the other script. Tells how many answers stayed the same.
    """
    from miaotui.client import Client, MiaotuiError
    from miaotui.robustness.examples import EXAMPLES
    from miaotui.robustness.probe import QuestionFileError, probe, read_squad

    try:
        items = list(EXAMPLES) if file is None else read_squad(file, limit=limit, seed=seed)
    except QuestionFileError as error:
        fail(error, 2)
    except OSError as error:
        fail(f"cannot read {file}: {error.strerror}", 2)
    try:
        with Client(url, timeout, key or None) as client:
            report = probe(items, lambda asked: _ask(client, asked), seed=seed)
    except MiaotuiError as error:
        fail(error)
    if as_json:
        print(json.dumps(report.as_json(), ensure_ascii=False, indent=2))
    else:
        show(Console(), report)


def _ask(client: Client, items: Sequence[Item]) -> list[Outcome]:
    """The answers. Raises `MiaotuiError` where one cannot be had."""
    from miaotui.client import MiaotuiError, Question
    from miaotui.robustness.probe import Outcome

    outcomes: dict[int, Outcome] = {}
    for first in range(0, len(items), _BATCH):
        part = items[first : first + _BATCH]
        questions = [Question(item.question, item.context, no_cache=True) for item in part]
        for index, answer in client.ask_many(questions):
            if isinstance(answer, MiaotuiError):
                raise answer
            outcomes[first + index] = Outcome(answer.text, bool(answer.warnings))
    if len(outcomes) != len(items):
        raise MiaotuiError(f"{len(items) - len(outcomes)} questions were not answered")
    return [outcomes[index] for index in range(len(items))]


def show(console: Console, report: Report) -> None:
    """Prints the report as a table."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("disturbance")
    for heading in ("questions", "same answer", "F1 with it", "F1 before", "F1 after", "warned"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        table.add_row(
            row.name,
            str(row.items),
            f"{row.same:.0%}",
            f"{row.f1:.2f}",
            "–" if row.right_before is None else f"{row.right_before:.2f}",
            "–" if row.right_after is None else f"{row.right_after:.2f}",
            f"{row.warned:.0%}",
        )
    console.print(table)
    console.print(
        f"\n{report.items} questions. Same answer: equal to the one without disturbance. F1 before "
        "and after: with the answers wanted. Warned: the input was noticed as unusual.",
        style="dim",
        highlight=False,
    )
