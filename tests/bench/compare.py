"""`make bench-peers`: Miaotui against bare engines and served ones, on the same weights.

All sides answer the same questions, in turns, on all cores; the median of the rounds is told, and
beside every speed the F1 and how many answers equal those of transformers in float32. What is
served is asked over HTTP by the same client. Further parts tell what more load, longer passages
and more stages cost, and what the caches bring. docs/bench.md says how each is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from miaotui.compression import compress_model
from miaotui.models.partition import plan_stages
from miaotui.models.precision import multiplies_bfloat16
from tests.bench.__main__ import BUNDLED, machine
from tests.bench.engines import ENGINES, why_not
from tests.bench.growth import GROWTH
from tests.bench.sides import Side, SideError, bare, litserve, miaotui, row
from tests.bench.tables import SAME_WEIGHTS, plot, print_cells, sections, write_markdown
from tests.bench.workload import QUESTION_SETS, Workload, held_out, made, trained_on

SERVED = ("onnxruntime-int8", "openvino-bf16", "openvino-int8")
REFERENCE = "transformers"
PARTS = ("engines", *GROWTH)
# One at a time, a round lasts too long with all questions.
ALONE = 40

Part = dict[str, Any]
Save = Callable[[Part], None]


def _checkpoints(
    model: Path, folder: Path, data: Path | None, skipped: list[tuple[str, str]]
) -> dict[str, tuple[Path, str]]:
    """The model as it is and compressed, and `--dtype`, by the names of Miaotui's sides."""
    found = {"Miaotui float32": (model, "float32")}
    if multiplies_bfloat16(torch.device("cpu")):
        found["Miaotui bfloat16"] = (model, "bfloat16")
    else:
        skipped.append(("Miaotui bfloat16", "this CPU does not multiply it faster"))
    compress_model(model, folder / "int8", method="int8")
    found["Miaotui int8"] = (folder / "int8", "auto")
    if data is None:
        skipped.append(("Miaotui int8-static", "no questions to calibrate on: give --data"))
    else:
        files = trained_on(data, folder)
        compress_model(model, folder / "static", method="words=4,int8-static", calibrate=files)
        found["Miaotui int8-static"] = (folder / "static", "auto")
    return found


def _parameter_bytes(model: Path, dtype: str) -> int:
    return sum(s.parameter_bytes for s in plan_stages(model, 1, dtype=dtype, device="cpu").stages)


async def _engines(options: argparse.Namespace, console: Console, save: Save) -> Part:
    """All sides in turns, at every concurrency."""
    draw = made if options.data is None else partial(held_out, options.data)
    work, scored = draw(options.questions, 1), draw(options.scored, 2)
    probe = work.bodies[:48]
    part: Part = {"title": "Engines", "skipped": [], "rows": []}
    skipped: list[tuple[str, str]] = part["skipped"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides: list[Side] = []

        def add(name: str, start: Callable[..., Side], engine: str) -> None:
            console.print(f"starting {name}")
            try:
                if why := why_not(engine):
                    raise SideError(why)
                sides.append(start(stack, engine, options.model, folder, probe))
            except SideError as error:
                skipped.append((name, str(error)))
                console.print(f"left out: {name}: {error}")

        for engine in options.engines:
            add(engine, bare, engine)
        for engine in options.served:
            add(f"{engine} behind LitServe", _served, engine)
        found = _checkpoints(options.model, folder, options.data, skipped)
        for given in options.checkpoint:
            found[f"Miaotui {given.name}"] = (given, "auto")
        for name, (model, dtype) in found.items():
            console.print(f"starting {name}")
            side, _ = await miaotui(stack, name, model, options.stages, dtype=dtype)
            sides.append(side)
        held = {"Miaotui bfloat16": (options.model, "bfloat16"), **found}
        part["parameters"] = {name: _parameter_bytes(*one) for name, one in held.items()}
        part["title"] += (
            f": {options.questions} questions, answers judged by {options.scored}, "
            f"{options.stages} stages"
        )
        for number in range(options.rounds + 1):
            for side in sides:
                console.print(f"round {number} of {options.rounds}: {side.name}")
                for at_once in options.at_once if side.kind != "bare" else [0]:
                    bodies = work.bodies[: ALONE if at_once == 1 else None]
                    if number:
                        await asyncio.to_thread(side.measure, bodies, at_once)
                    elif at_once in (0, 32 if 32 in options.at_once else options.at_once[-1]):
                        told = await asyncio.to_thread(side.round, scored.bodies, at_once)
                        side.scored = told[2]
            if number:
                part["rows"] = _rows(sides, scored)
                save(part)
    return part


def _served(*arguments: Any) -> Side:
    from importlib.util import find_spec

    if not find_spec("litserve"):
        raise SideError("not installed: litserve (make bench-peers installs it)")
    return litserve(*arguments)


def _rows(sides: Sequence[Side], scored: Workload) -> list[dict[str, Any]]:
    plain = next((s for s in sides if s.name.startswith(f"{REFERENCE} (")), sides[0])
    return [asdict(row(side, at, plain.scored, scored)) for side in sides for at in side.measured]


def _parse() -> argparse.Namespace:
    data = QUESTION_SETS if QUESTION_SETS.is_dir() else None
    parser = argparse.ArgumentParser(prog="python -m tests.bench.compare", description=__doc__)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument(
        "--data", type=Path, default=data, help="folder of SQuAD files; absent: made questions"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=ENGINES)
    parser.add_argument("--served", nargs="*", choices=ENGINES, default=SERVED)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument(
        "--at-once",
        type=lambda text: [int(one) for one in text.split(",")],
        default=[1, 8, 32, 128],
        help="requests in flight over HTTP, comma-separated",
    )
    parser.add_argument("--questions", type=int, default=160)
    parser.add_argument(
        "--scored", type=int, default=1000, help="questions by which answers are judged"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        action="append",
        default=[],
        help="a further checkpoint that Miaotui serves, under its folder's name; may be repeated",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="written after each part")
    parser.add_argument("--resume", action="store_true", help="keep the parts that --json has")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path, help="questions a second against F1: .svg or .png")
    options = parser.parse_args()
    for folder in (options.model, *options.checkpoint):
        if not (folder / "config.json").exists():
            parser.error(f"{folder} has no config.json: it is no model directory")
    names = [*SAME_WEIGHTS, *(f"Miaotui {folder.name}" for folder in options.checkpoint)]
    if len(set(names)) < len(names):
        parser.error("--checkpoint: two sides of one name; call the folders otherwise")
    if options.resume and not options.json:
        parser.error("--resume needs --json FILE, the report to go on with")
    if min(options.at_once) < 1:
        parser.error("--at-once: at least 1")
    return options


def main() -> None:
    """Parses flags, measures, prints."""
    os.environ["MIAOTUI_TEST_FORK"] = "0"  # services start as an operator starts them
    options = _parse()
    progress = Console(stderr=True)
    report: dict[str, Any] = {"model": options.model.name, "machine": machine(), "parts": {}}
    if options.resume and options.json.exists():
        before = json.loads(options.json.read_text())
        report["parts"] = {k: v for k, v in before["parts"].items() if v.get("whole")}

    def save(name: str, part: Part) -> None:
        report["parts"][name] = part
        if options.json:
            new = options.json.with_suffix(".new")
            new.write_text(json.dumps(report, indent=2) + "\n")
            new.replace(options.json)

    for name in options.only:
        if name in report["parts"]:
            progress.print(f"{name}: kept from {options.json}")
            continue
        if name == "engines":
            part = asyncio.run(_engines(options, progress, lambda part: save("engines", part)))
        else:
            part = asyncio.run(GROWTH[name](options, progress))
        save(name, {**part, "whole": True})
    console = Console()
    console.print(f"{options.model.name}; {machine()}", soft_wrap=True)
    for title, cells, remarks in sections(report):
        console.print(f"\n{title}", soft_wrap=True)
        print_cells(cells, console)
        for line in remarks:
            console.print(line, soft_wrap=True, markup=False)
    if options.markdown:
        write_markdown(report, options.markdown)
    engines = report["parts"].get("engines")
    if options.plot and engines and not plot(engines["rows"], options.plot):
        progress.print("no plot: F1 is known only of questions with answers (--data)")


if __name__ == "__main__":
    main()
