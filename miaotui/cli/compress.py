"""`miaotui compress`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from miaotui.cli.shared import Json, fail


def register(app: typer.Typer) -> None:
    """Add the command to an app."""
    app.command(
        epilog="""[bold]Examples[/]

  miaotui compress model fast                            8-bit weights and activations

  miaotui compress model fast --method int8-static --calibrate train.json --evaluate dev.json

  miaotui compress model small --method prune-neurons=0.3,int8-static --calibrate train.json \\
--recover-steps 200

  miaotui compress model small --method svd=0.7 --recover-steps 200 --private own.json --epsilon 4

  miaotui compress model fast --max-loss 0.5 --calibrate train.json --evaluate dev.json

  miaotui compress model fast --max-loss 1 -m int8 -m svd=0.7,int8 --evaluate dev.json \\
--dask tcp://10.0.0.5:8786

  miaotui up --model fast

[bold]Methods[/]: int8, int8-static, int2 to int7 (and -static), prune-weights=SHARE, \
prune-2:4, prune-heads=SHARE, prune-neurons=SHARE, prune-layers=COUNT, svd=SHARE, asvd=SHARE \
(the share of parameters kept), decompose=COUNT, words=BITS (of the word embeddings); several \
with commas between, a quantisation last."""
    )(compress)


def compress(
    model: Annotated[Path, typer.Argument(help="Model directory.", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="New directory to write.", metavar="OUT")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="What to do, in order; see below. May be repeated with --max-loss.",
            metavar="STEPS",
            show_default="int8",
        ),
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            help="SQuAD file to calibrate, find what matters and recover on; may be repeated.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    evaluate: Annotated[
        list[Path] | None,
        typer.Option(
            help="SQuAD file to score and time both models on; may be repeated.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions of each file evaluated.")] = 200,
    calibration_questions: Annotated[
        int, typer.Option(min=1, help="Questions of each file calibrated on.")
    ] = 64,
    group_size: Annotated[
        int, typer.Option(min=1, help="Inputs that share a scale, below 8 bits.")
    ] = 32,
    second_order: Annotated[
        bool, typer.Option("--second-order", help="Sensitivity by the Fisher diagonal.")
    ] = False,
    recover_steps: Annotated[
        int, typer.Option(min=0, help="Steps of distillation after pruning or factorising.")
    ] = 0,
    recover_rate: Annotated[
        float, typer.Option(help="Learning rate that the distillation begins with.")
    ] = 5e-5,
    recover_questions: Annotated[
        int,
        typer.Option(
            min=0,
            help="Questions of each --calibrate file recovered on.",
            show_default="as calibrated on",
        ),
    ] = 0,
    private: Annotated[
        list[Path] | None,
        typer.Option(
            help="SQuAD file to recover on with differential privacy (DP-SGD), and to use for "
            "nothing else; may be repeated.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    epsilon: Annotated[float, typer.Option(help="Privacy that --private may spend at most.")] = 8.0,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(
            help="Noise, as a multiple of --clip, instead of --epsilon.", show_default=False
        ),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(
            help="Chance that epsilon does not hold; 1 / (10 private passages) if not given.",
            show_default=False,
        ),
    ] = None,
    clip: Annotated[float, typer.Option(help="Longest gradient of a private passage.")] = 1.0,
    private_batch: Annotated[int, typer.Option(help="Private passages a step, on average.")] = 64,
    max_loss: Annotated[
        float | None,
        typer.Option(
            help="Try each --method, or a grid of combinations where none is given, and keep the "
            "fastest that loses at most so much F1 on --evaluate.",
            metavar="F1",
            show_default=False,
        ),
    ] = None,
    dask: Annotated[
        str | None,
        typer.Option(
            help="Where the work runs: the address of a Dask scheduler (tcp://HOST:PORT), whose "
            "workers see the same files; local: a process for each core; off: here.",
            metavar="WHERE",
            show_default="local with --max-loss, else off",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a smaller and faster checkpoint of a model that finds answers."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from miaotui.compression import compress_model
    from miaotui.compression.budget import compress_within
    from miaotui.compression.report import as_text

    methods = method or []
    if max_loss is None and len(methods) > 1:
        fail("several --method are tried with --max-loss; for steps in order, put commas", 2)
    console = Console(stderr=True, highlight=False)
    progress = Progress(
        TextColumn("tasks"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
    )
    bar = progress.add_task("", total=None)
    options: dict[str, Any] = {
        "calibrate": calibrate or (),
        "evaluate": evaluate or (),
        "calibration_questions": calibration_questions,
        "limit": limit,
        "group_size": group_size,
        "second_order": second_order,
        "recover_steps": recover_steps,
        "recover_rate": recover_rate,
        "recover_questions": recover_questions,
        "dask": _where(dask, sweeping=max_loss is not None, tell=console.print),
        "tell": lambda text: console.print(text, style="dim", markup=False),
        "advance": lambda done, total: progress.update(bar, completed=done, total=total),
    }
    found = None
    try:
        if private:
            options |= {
                "private": private,
                "privacy": _privacy(
                    epsilon=epsilon,
                    noise_multiplier=noise_multiplier,
                    delta=delta,
                    clip=clip,
                    batch=private_batch,
                ),
            }
        with progress, _logged(console):
            if max_loss is None:
                report = compress_model(model, out, method=(methods or ["int8"])[0], **options)
            else:
                found = compress_within(model, out, max_loss=max_loss, methods=methods, **options)
                report = found.report
    except ValueError as error:
        fail(str(error))
    if as_json:
        content = report.as_json()
        if found is not None:
            content["tried"] = [asdict(one) for one in found.tried]
        print(json.dumps(content, ensure_ascii=False, default=str))
        return
    if found is not None:
        print((out / "sweep.txt").read_text(encoding="utf-8"))
    print(as_text(report), end="")
    print(f"{out}: the checkpoint, with compression.json, .txt and .svg")


@contextmanager
def _logged(console: Console) -> Iterator[None]:
    """Shows above the progress bar how far a recovery is; in Dask's workers nobody hears it."""
    log = logging.getLogger("miaotui.compression")
    handler = RichHandler(
        console=console,
        show_time=False,
        show_level=False,
        show_path=False,
        highlighter=NullHighlighter(),
    )
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(handler)


def _where(dask: str | None, *, sweeping: bool, tell: Callable[[str], None]) -> str | None:
    """What `compress_model` takes as `dask`."""
    if dask == "off" or (dask is None and not sweeping):
        return None
    if dask is None and find_spec("distributed") is None:
        tell("one after another: Dask is not installed (pip install 'miaotui[compress]')")
        return None
    return dask or "local"


def _privacy(**given: Any) -> Any:
    try:
        from miaotui.training.dpsgd import PrivacyConfig
    except ModuleNotFoundError as error:
        fail(f"{error}; pip install 'miaotui[private]'")
    return PrivacyConfig(**given)
