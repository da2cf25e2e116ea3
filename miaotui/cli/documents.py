"""The commands about documents: `miaotui add`, `miaotui documents`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from miaotui.cli.asking import DEFAULT_URL
from miaotui.cli.shared import Key

DEFAULT_COLLECTION = "default"

_Url = Annotated[
    str,
    typer.Option("--url", envvar="MIAOTUI_URL", help="The gateway's address.", metavar="URL"),
]
_Collection = Annotated[
    str, typer.Option("--collection", "-C", help="The collection.", metavar="NAME")
]

documents_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Show and remove the documents of a collection.",
)


def register(app: typer.Typer) -> None:
    """Adds the commands to `miaotui`."""
    app.command("add", epilog=_ADD_EXAMPLES)(add)
    app.add_typer(documents_app, name="documents")


_ADD_EXAMPLES = """[bold]Examples[/]

  miaotui add handbook.pdf notes/

  miaotui add ~/papers --collection papers

  miaotui ask "Who wrote it?" --collection papers"""


def add(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Files and folders.", metavar="PATH…", show_default=False),
    ],
    collection: _Collection = DEFAULT_COLLECTION,
    url: _Url = DEFAULT_URL,
    key: Key = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Add documents to a collection: txt, Markdown, HTML, PDF, docx; whole folders.

    What is there already stays as it is; a file that has changed takes its old version's
    place. Then `miaotui ask` answers from them.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from miaotui.cli.asking import AskError
    from miaotui.cli.uploading import Report, add_files, find_files, show_report

    report = Report()
    files = find_files(paths, report)
    progress = Progress(
        TextColumn("adding"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    try:
        with progress:
            bar = progress.add_task("", total=len(files))
            add_files(
                url, collection, files, report, lambda count: progress.advance(bar, count), key
            )
    except AskError as error:
        _fail(error)
    if as_json:
        print(json.dumps(report.as_json(), ensure_ascii=False, indent=2))
    else:
        show_report(Console(), report, collection)
    taken = report.added + report.replaced + report.unchanged
    raise typer.Exit(0 if taken or not report.skipped else 1)


@documents_app.command("list")
def list_documents(
    collection: _Collection = DEFAULT_COLLECTION,
    url: _Url = DEFAULT_URL,
    key: Key = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the documents of a collection, by source."""
    from miaotui.cli.asking import AskError
    from miaotui.cli.uploading import all_documents, show_documents

    try:
        found = all_documents(url, collection, key)
    except AskError as error:
        _fail(error)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        show_documents(Console(), found)


@documents_app.command("delete")
def delete(
    documents: Annotated[
        list[str],
        typer.Argument(
            help="Ids or sources, as `documents list` shows them; or paths.",
            metavar="DOCUMENT…",
            show_default=False,
        ),
    ],
    collection: _Collection = DEFAULT_COLLECTION,
    url: _Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Remove documents from a collection."""
    from miaotui.cli.asking import AskError
    from miaotui.cli.uploading import delete_document

    for wanted in documents:
        try:
            source = delete_document(url, collection, wanted, key)
        except AskError as error:
            _fail(error)
        Console().print(f"removed {source}", markup=False, highlight=False)


def _fail(error: object) -> NoReturn:
    Console(stderr=True).print(f"miaotui: {error}", style="red", markup=False, highlight=False)
    raise typer.Exit(1)
