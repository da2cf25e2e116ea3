"""The commands of `miaotui`. Each imports what it needs when it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from miaotui import __version__
from miaotui.cli import up_command, write_command
from miaotui.cli.asking import DEFAULT_URL
from miaotui.cli.compress import register as register_compress
from miaotui.cli.documents import DEFAULT_COLLECTION
from miaotui.cli.documents import register as register_documents
from miaotui.cli.keys import keys_app
from miaotui.cli.media_commands import register as register_media
from miaotui.cli.probe import register as register_probe
from miaotui.cli.serving import serve_app
from miaotui.cli.shared import Device, Dtype, Json, Key, Url, fail, read_passage

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    help="""Miaotui answers questions from a passage, in real time, with a model that is \
split over several processes or machines.

New here? [bold]miaotui up --demo[/] starts everything on this machine and asks two questions. \
Then, in another terminal:

    miaotui ask "When was it built?" --file article.txt

With a model that writes, [bold]miaotui up --generator DIR[/]:

    miaotui write "Explain tides to a child."

[bold]miaotui COMMAND --help[/] explains a command, with examples.""",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"miaotui {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command(epilog=up_command.EPILOG)(up_command.up)


@app.command(
    epilog="""[bold]Examples[/]

  miaotui ask "Who wrote it?" --context "It was written by Jane Austen in 1813."

  miaotui ask "什么是BERT模型？" --file article.txt --top-k 3

  cat article.txt | miaotui ask "When?" --json

  miaotui ask "Who signed the treaty?"   from the documents of `miaotui add`"""
)
def ask(
    question: Annotated[str, typer.Argument(help="The question.", show_default=False)],
    context: Annotated[
        str | None, typer.Option("--context", "-c", help="The passage.", metavar="TEXT")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A file with the passage, in UTF-8.", metavar="FILE"),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Answers to show.")] = 1,
    max_answer_length: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens.", show_default=False)
    ] = None,
    no_answer_threshold: Annotated[
        float | None,
        typer.Option(help="When to say that there is no answer.", show_default=False),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compute it anew.")] = False,
    collection: Annotated[
        str | None,
        typer.Option(
            "--collection",
            "-C",
            help="Answer from these documents.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    grpc: Annotated[
        str | None,
        typer.Option(help="Ask over gRPC, at this address.", metavar="HOST:PORT"),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", "-e", help="Show why: takes seconds, over HTTP only.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 30.0,
) -> None:
    """Ask a running Miaotui a question about a passage, or about your documents.

    The passage comes from --context, --file, or standard input. Without one, the answer comes
    from the documents that `miaotui add` has added.
    """
    from miaotui.cli.asking import AskError, Options, ask_grpc, ask_http
    from miaotui.cli.demo import Asked

    if collection is not None and (context is not None or file is not None or grpc):
        fail("--collection goes with neither --context, --file nor --grpc", 2)
    if explain and grpc:
        fail("--explain goes with --url, not with --grpc", 2)
    passage = ""
    if context is not None or file is not None or grpc:
        passage = read_passage(context, file, "--file")
    elif collection is None:
        passage = (
            "" if sys.stdin is None or sys.stdin.isatty() else read_passage(None, None, "--file")
        )
        collection = None if passage.strip() else DEFAULT_COLLECTION
    asked = Asked(question, passage)
    options = Options(
        *(top_k, max_answer_length, no_answer_threshold, no_cache, timeout, collection, key),
        explain=explain,
    )
    try:
        reply = ask_grpc(grpc, asked, options) if grpc else ask_http(url, asked, options)
    except AskError as error:
        fail(error)
    if as_json:
        print(json.dumps(reply.body, ensure_ascii=False, indent=2))
        return
    from miaotui.cli.render import show_reply

    show_reply(Console(), asked, reply)


@app.command(epilog="[bold]Example[/]\n\n  miaotui plan ./bert-base-chinese --stages 3")
def plan(
    model: Annotated[
        Path | None,
        typer.Argument(help="Model directory; without it, the bundled one.", show_default=False),
    ] = None,
    stages: Annotated[int, typer.Option("--stages", "-n", min=1, help="Stages.")] = 2,
    layers: Annotated[
        str, typer.Option(help='Cost these layers instead of planning, such as "0-3,3-6".')
    ] = "",
    dtype: Dtype = "auto",
    device: Device = "auto",
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the costs here instead of estimating them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show how a model would be split over stages: layers, sizes, expected cost."""
    from miaotui.cli.layout import BUNDLED_MODEL, LayoutError, check_model
    from miaotui.cli.planning import make_plan, show_plan

    directory = model or BUNDLED_MODEL
    try:
        check_model(directory)
        planned = make_plan(
            directory, stages, layers=layers, dtype=dtype, device=device, measure=measure
        )
    except (LayoutError, ValueError, OSError) as error:
        fail(error, 2)
    if as_json:
        print(json.dumps(planned.as_json(), indent=2))
        return
    show_plan(Console(), planned)


@app.command()
def models(url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """List the models that a running Miaotui serves."""
    from miaotui.cli.asking import AskError
    from miaotui.cli.status import fetch, show_models

    try:
        found = fetch(url, "/v1/models", key)
    except AskError as error:
        fail(error)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
        return
    show_models(Console(), found["models"])


@app.command()
def status(url: Url = DEFAULT_URL, key: Key = "", as_json: Json = False) -> None:
    """Show the stages of a running Miaotui and what they hold and do.

    The exit code is 0 where all models are ready.
    """
    from miaotui.cli.asking import AskError
    from miaotui.cli.status import all_ready, fetch, show_pipelines

    try:
        found = fetch(url, "/v1/pipeline", key)
    except AskError as error:
        fail(error)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
        ready = all_ready(found)
    else:
        ready = show_pipelines(Console(), found)
    raise typer.Exit(0 if ready else 1)


app.command(epilog=write_command.EPILOG)(write_command.write)
register_media(app)
register_documents(app)
register_probe(app)
register_compress(app)
app.add_typer(keys_app, name="keys")
app.add_typer(serve_app, name="serve")
