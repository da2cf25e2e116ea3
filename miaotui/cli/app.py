"""The commands of `miaotui`. Each imports what it needs when it runs."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from miaotui import __version__
from miaotui.cli import write_command
from miaotui.cli.asking import DEFAULT_URL
from miaotui.cli.documents import DEFAULT_COLLECTION
from miaotui.cli.documents import register as register_documents
from miaotui.cli.serving import serve_app
from miaotui.cli.shared import Json, Url, fail, read_passage

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


@app.command(
    epilog="""[bold]Examples[/]

  miaotui up --demo                     start everything, ask two questions, keep running

  miaotui up --model ./bert --stages 4  another model, in four processes

  miaotui up --generator ./qwen3        a model that writes, beside the one that answers

  miaotui up --no-qa --generator ./llama --generator-stages 3

  miaotui up --redis-url redis://127.0.0.1:6379/0

  miaotui up --once --ask "How tall is it?" --context-file tower.txt"""
)
def up(
    model: Annotated[
        Path | None,
        typer.Option(
            envvar="MIAOTUI_MODEL",
            help="Hugging Face model directory; without it, the model that Miaotui brings. "
            "none: as --no-qa.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    stages: Annotated[
        int, typer.Option("--stages", "-n", min=1, help="Processes to split the model over.")
    ] = 2,
    generator: Annotated[
        Path | None,
        typer.Option(
            envvar="MIAOTUI_GENERATOR",
            help="Directory of a model that writes text (Llama, Qwen, Mistral, Gemma, GPT-2); "
            "serves miaotui write and OpenAI's API.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    generator_stages: Annotated[
        int, typer.Option(min=1, help="Processes to split the generator over.")
    ] = 2,
    no_qa: Annotated[
        bool, typer.Option("--no-qa", help="Start no model that finds answers; with --generator.")
    ] = False,
    layers: Annotated[
        str,
        typer.Option(help='Layers of each stage, such as "0-3,3-6"; otherwise planned by cost.'),
    ] = "",
    host: Annotated[
        str, typer.Option(help="Where the APIs listen; 0.0.0.0: on every network.")
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Of the HTTP API; 0: any free one.")] = 8080,
    grpc_port: Annotated[int, typer.Option(help="Of the gRPC API; 0: any free one.")] = 50050,
    tokenizer_port: Annotated[
        int | None,
        typer.Option(help="Of the tokenizer service; usually 50051.", show_default=False),
    ] = None,
    shard_port: Annotated[
        int | None,
        typer.Option(help="Of stage 0, the others follow; usually 50060.", show_default=False),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; auto: what the hardware does well.")
    ] = "auto",
    wire_dtype: Annotated[
        str, typer.Option(help="Of what travels between stages; auto: as computed.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    redis_url: Annotated[
        str | None,
        typer.Option(
            envvar="REDIS_URL", help="Cache there; otherwise in memory.", show_default=False
        ),
    ] = None,
    tls: Annotated[
        bool,
        typer.Option(
            "--tls",
            help="Mutual TLS between the services, with a certificate for this run only. "
            "MIAOTUI_TLS_DIR takes one that is there.",
        ),
    ] = False,
    documents: Annotated[
        Path | None,
        typer.Option(
            envvar="MIAOTUI_GATEWAY_DOCUMENTS",
            help="Where the documents of `miaotui add` are kept; usually in your data folder.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Ask an English and a Chinese question once ready.")
    ] = False,
    ask: Annotated[
        str | None,
        typer.Option("--ask", help="Ask this question once ready.", metavar="QUESTION"),
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="The passage for --ask.", metavar="TEXT")
    ] = None,
    context_file: Annotated[
        Path | None, typer.Option(help="A file with the passage for --ask.", metavar="FILE")
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Stop when ready and the questions are answered.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show only the services' warnings and errors.")
    ] = False,
    log_level: Annotated[
        str, typer.Option(help="Of the services: debug, info, warning, error.")
    ] = "info",
    ready_timeout: Annotated[
        float, typer.Option(help="Seconds that the services may take to start.")
    ] = 180.0,
) -> None:
    """Start all services on this machine and keep them running.

    A tokenizer service and the stages of each model, and the gateway, run as separate
    processes. One that dies is started again. Ctrl-C stops all of them.
    """
    from miaotui.cli.demo import DEMO, Asked
    from miaotui.cli.layout import BUNDLED_MODEL, LayoutError, Wanted, lay_out
    from miaotui.cli.up import Plan, run_up

    questions = list(DEMO) if demo else []
    if ask is not None:
        questions.append(Asked(ask, read_passage(context, context_file, "--context-file")))
    elif context is not None or context_file is not None:
        fail("--context and --context-file need a question: --ask QUESTION", 2)
    no_qa = no_qa or model == Path("none")
    if no_qa and questions:
        fail("--demo and --ask need a model that finds answers: leave --no-qa out", 2)
    wanted = Wanted(
        model=None if no_qa else model or BUNDLED_MODEL,
        stages=stages,
        generator=generator,
        generator_stages=generator_stages,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        tokenizer_port=tokenizer_port,
        shard_port=shard_port,
        layers=layers,
        dtype=dtype,
        wire_dtype=wire_dtype,
        device=device,
        redis_url=redis_url,
        documents=documents,
        log_level=log_level,
    )
    try:
        layout = lay_out(wanted)
    except (LayoutError, OSError) as error:
        fail(error, 2)
    with tempfile.TemporaryDirectory(prefix="miaotui-tls-") as certificates:
        if tls:
            from services.rpc.certificates import make_certificates

            make_certificates(Path(certificates))
            # For the services, which inherit it, and for the probes of this process.
            os.environ["MIAOTUI_TLS_DIR"] = certificates
        code = run_up(layout, Plan(questions, once, quiet, ready_timeout), Console())
    raise typer.Exit(code)


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
    grpc: Annotated[
        str | None,
        typer.Option(help="Ask over gRPC, at this address.", metavar="HOST:PORT"),
    ] = None,
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
    passage = ""
    if context is not None or file is not None or grpc:
        passage = read_passage(context, file, "--file")
    elif collection is None:
        passage = (
            "" if sys.stdin is None or sys.stdin.isatty() else read_passage(None, None, "--file")
        )
        collection = None if passage.strip() else DEFAULT_COLLECTION
    asked = Asked(question, passage)
    options = Options(top_k, max_answer_length, no_answer_threshold, no_cache, timeout, collection)
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
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; auto: what the hardware does well.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
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
def models(url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """List the models that a running Miaotui serves."""
    from miaotui.cli.asking import AskError
    from miaotui.cli.status import fetch, show_models

    try:
        found = fetch(url, "/v1/models")
    except AskError as error:
        fail(error)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
        return
    show_models(Console(), found["models"])


@app.command()
def status(url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Show the stages of a running Miaotui and what they hold and do.

    The exit code is 0 where all models are ready.
    """
    from miaotui.cli.asking import AskError
    from miaotui.cli.status import fetch, show_pipelines

    try:
        found = fetch(url, "/v1/pipeline")
    except AskError as error:
        fail(error)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
        ready = all(one["ready"] for one in (found, *found["others"]))
    else:
        ready = show_pipelines(Console(), found)
    raise typer.Exit(0 if ready else 1)


app.command(epilog=write_command.EPILOG)(write_command.write)
register_documents(app)
app.add_typer(serve_app, name="serve")
