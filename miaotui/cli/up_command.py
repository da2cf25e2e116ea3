"""The command `miaotui up`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from miaotui.cli.shared import Device, Dtype, fail, read_passage

EPILOG = """[bold]Examples[/]

  miaotui up --demo                     start everything, ask two questions, keep running

  miaotui up --model ./bert --stages 4  another model, in four processes

  miaotui up --generator ./qwen3        a model that writes, beside the one that answers

  miaotui up --no-qa --generator ./llama --generator-stages 3

  miaotui up --transcriber ./whisper-tiny --captioner ./vit-gpt2-image-captioning

  miaotui up --redis-url redis://127.0.0.1:6379/0

  miaotui up --once --ask "How tall is it?" --context-file tower.txt"""


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
    replicas: Annotated[
        str,
        typer.Option(
            help="Processes a stage: one number for all stages, or one a stage, such as 1,2."
        ),
    ] = "1",
    generator_stages: Annotated[
        int, typer.Option(min=1, help="Processes to split the generator over.")
    ] = 2,
    transcriber: Annotated[
        Path | None,
        typer.Option(
            envvar="MIAOTUI_TRANSCRIBER",
            help="Directory of a Whisper model, which writes down what is said.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    transcriber_stages: Annotated[
        int, typer.Option(min=1, help="Processes to split the transcriber over.")
    ] = 2,
    captioner: Annotated[
        Path | None,
        typer.Option(
            envvar="MIAOTUI_CAPTIONER",
            help="Directory of a model that describes pictures (ViT and GPT-2).",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    captioner_stages: Annotated[
        int, typer.Option(min=1, help="Processes to split the captioner over.")
    ] = 2,
    encoder_stages: Annotated[
        int,
        typer.Option(
            min=0,
            help="Processes to split the encoder over that finds documents by their meaning; "
            "0: none, they are found by their words only.",
        ),
    ] = 1,
    no_qa: Annotated[
        bool,
        typer.Option("--no-qa", help="Start no model that finds answers; with one of the others."),
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
    dtype: Dtype = "auto",
    wire_dtype: Annotated[
        str, typer.Option(help="Of what travels between stages; auto: as computed; int8: least.")
    ] = "auto",
    device: Device = "auto",
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
        str | None,
        typer.Option(
            envvar="MIAOTUI_GATEWAY_DOCUMENTS",
            help="Where the documents of `miaotui add` are kept: a folder, usually in your data "
            "folder, or a PostgreSQL database.",
            metavar="DIR|URL",
            show_default=False,
        ),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            "--keys",
            envvar="MIAOTUI_GATEWAY_KEYS",
            help="File of `miaotui keys`: only who has one of them may ask.",
            metavar="FILE",
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

    A tokenizer service and the stages of each model, an encoder's stage for documents, and the
    gateway, run as separate processes. One that dies is started again. Ctrl-C stops all of them.
    """
    from miaotui.cli.demo import DEMO, Asked
    from miaotui.cli.layout import BUNDLED_MODEL, LayoutError, Wanted, lay_out
    from miaotui.cli.up import Plan, run_up

    questions = list(DEMO) if demo else []
    if ask is not None:
        questions.append(Asked(ask, read_passage(context, context_file, "--context-file")))
    elif context is not None or context_file is not None:
        fail("--context and --context-file need a question: --ask QUESTION", 2)
    if questions and keys is not None and not os.environ.get("MIAOTUI_KEY"):
        fail("with --keys, --demo and --ask need a key, too: put one into MIAOTUI_KEY", 2)
    no_qa = no_qa or model == Path("none")
    if no_qa and questions:
        fail("--demo and --ask need a model that finds answers: leave --no-qa out", 2)
    wanted = Wanted(
        model=None if no_qa else model or BUNDLED_MODEL,
        stages=stages,
        generator=generator,
        generator_stages=generator_stages,
        transcriber=transcriber,
        transcriber_stages=transcriber_stages,
        captioner=captioner,
        captioner_stages=captioner_stages,
        encoder_stages=encoder_stages,
        replicas=replicas,
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
        keys=keys,
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
