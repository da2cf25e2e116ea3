"""The commands of `miaotui`. Each imports what it needs when it runs."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from miaotui import __version__
from miaotui.cli.asking import DEFAULT_URL

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    help="""Miaotui answers questions from a passage, in real time, with a model that is \
split over several processes or machines.

New here? [bold]miaotui up --demo[/] starts everything on this machine and asks two questions. \
Then, in another terminal:

    miaotui ask "When was it built?" --file article.txt

[bold]miaotui COMMAND --help[/] explains a command, with examples.""",
)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_Url = Annotated[
    str,
    typer.Option("--url", envvar="MIAOTUI_URL", help="The gateway's address.", metavar="URL"),
]


def _fail(error: object, code: int = 1) -> NoReturn:
    # Errors hold paths and quoted text; rich must not take their brackets for markup.
    Console(stderr=True).print(f"miaotui: {error}", style="red", markup=False, highlight=False)
    raise typer.Exit(code)


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

  miaotui up --redis-url redis://127.0.0.1:6379/0

  miaotui up --once --ask "How tall is it?" --context-file tower.txt"""
)
def up(
    model: Annotated[
        Path | None,
        typer.Option(
            envvar="MIAOTUI_MODEL",
            help="Hugging Face model directory; without it, the model that Miaotui brings.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    stages: Annotated[
        int, typer.Option("--stages", "-n", min=1, help="Processes to split the model over.")
    ] = 2,
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

    A tokenizer service, the model's stages and the gateway run as separate processes.
    One that dies is started again. Ctrl-C stops all of them.
    """
    from miaotui.cli.demo import DEMO, Asked
    from miaotui.cli.layout import BUNDLED_MODEL, LayoutError, Wanted, lay_out
    from miaotui.cli.up import Plan, run_up

    questions = list(DEMO) if demo else []
    if ask is not None:
        questions.append(Asked(ask, _passage(context, context_file, "--context-file")))
    elif context is not None or context_file is not None:
        _fail("--context and --context-file need a question: --ask QUESTION", 2)
    wanted = Wanted(
        model=model or BUNDLED_MODEL,
        stages=stages,
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
        log_level=log_level,
    )
    try:
        layout = lay_out(wanted)
    except (LayoutError, OSError) as error:
        _fail(error, 2)
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

  cat article.txt | miaotui ask "When?" --json"""
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
    as_json: _Json = False,
    url: _Url = DEFAULT_URL,
    grpc: Annotated[
        str | None,
        typer.Option(help="Ask over gRPC, at this address.", metavar="HOST:PORT"),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 30.0,
) -> None:
    """Ask a running Miaotui a question about a passage.

    The passage comes from --context, --file, or standard input.
    """
    from miaotui.cli.asking import AskError, Options, ask_grpc, ask_http
    from miaotui.cli.demo import Asked

    asked = Asked(question, _passage(context, file, "--file"))
    options = Options(top_k, max_answer_length, no_answer_threshold, no_cache, timeout)
    try:
        reply = ask_grpc(grpc, asked, options) if grpc else ask_http(url, asked, options)
    except AskError as error:
        _fail(error)
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
    as_json: _Json = False,
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
        _fail(error, 2)
    if as_json:
        print(json.dumps(planned.as_json(), indent=2))
        return
    show_plan(Console(), planned)


@app.command()
def models(url: _Url = DEFAULT_URL, as_json: _Json = False) -> None:
    """List the models that a running Miaotui serves."""
    from miaotui.cli.asking import AskError
    from miaotui.cli.status import fetch, show_models

    try:
        found = fetch(url, "/v1/models")
    except AskError as error:
        _fail(error)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
        return
    show_models(Console(), found["models"])


@app.command()
def status(url: _Url = DEFAULT_URL, as_json: _Json = False) -> None:
    """Show the stages of a running Miaotui and what they hold and do."""
    from miaotui.cli.asking import AskError
    from miaotui.cli.status import fetch, show_pipeline

    try:
        found = fetch(url, "/v1/pipeline")
    except AskError as error:
        _fail(error)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        show_pipeline(Console(), found)
    raise typer.Exit(0 if found["ready"] else 1)


_SERVE_SETTINGS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],  # the service's own flags follow, --help among them
}
serve_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Run one service in the foreground, for a Miaotui spread over several machines.

Each takes its settings as flags or from the environment; \
[bold]miaotui serve shard --help[/] lists them.""",
    epilog="""[bold]Example[/]: two stages on two machines

  a$ miaotui serve tokenizer --model ./qa

  a$ miaotui serve shard --model ./qa --stage 0 --stages a:50060,b:50060

  b$ miaotui serve shard --model ./qa --stage 1 --stages a:50060,b:50060

  a$ miaotui serve gateway --tokenizer a:50051 --shard a:50060""",
)
app.add_typer(serve_app, name="serve")


@serve_app.command("tokenizer", context_settings=_SERVE_SETTINGS)
def serve_tokenizer(context: typer.Context) -> None:
    """Clean and tokenise text."""
    _serve("tokenizer", context)


@serve_app.command("shard", context_settings=_SERVE_SETTINGS)
def serve_shard(context: typer.Context) -> None:
    """Hold one stage of the model."""
    _serve("shard", context)


@serve_app.command("gateway", context_settings=_SERVE_SETTINGS)
def serve_gateway(context: typer.Context) -> None:
    """Answer over HTTP and gRPC."""
    _serve("gateway", context)


def _serve(service: str, context: typer.Context) -> None:
    from miaotui.cli.serve import serve

    serve(service, context.args)


def _passage(context: str | None, file: Path | None, flag: str) -> str:
    """The passage from the flag, the file, or standard input."""
    if context is not None and file is not None:
        _fail(f"give the passage once: either --context or {flag}", 2)
    if context is not None:
        return context
    if file is None and (sys.stdin is None or sys.stdin.isatty()):
        _fail(f"there is no passage. Give it with --context TEXT or {flag} FILE", 2)
    try:
        data = file.read_bytes() if file is not None else sys.stdin.buffer.read()
    except OSError as error:
        _fail(f"cannot read {file}: {os.strerror(error.errno or 0)}", 2)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _fail(
            f"{file or 'standard input'} is not UTF-8 text (byte {error.start}). Convert it, "
            "for example with iconv -f GB18030 -t UTF-8",
            2,
        )
