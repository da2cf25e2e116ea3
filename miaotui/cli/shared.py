"""What several commands have in common: options, how they fail, how they read text."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Url = Annotated[
    str,
    typer.Option("--url", envvar="MIAOTUI_URL", help="The gateway's address.", metavar="URL"),
]

Key = Annotated[
    str,
    typer.Option(
        "--key",
        envvar="MIAOTUI_KEY",
        help="Your API key, where the gateway asks for one; better in MIAOTUI_KEY, because "
        "everybody on a machine can see its commands.",
        metavar="KEY",
        show_default=False,
    ),
]

Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16 or float16; auto: bfloat16 on GPUs, float32 on CPUs; fast: "
        "bfloat16 on CPUs too, where it is faster."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


def headers_with(key: str) -> dict[str, str]:
    """The headers of a request with this key; without, where it is empty."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def fail(error: object, code: int = 1) -> NoReturn:
    """Prints an error and ends the command."""
    # Errors hold paths and quoted text; rich must not take their brackets for markup.
    Console(stderr=True).print(f"miaotui: {error}", style="red", markup=False, highlight=False)
    raise typer.Exit(code)


def read_passage(context: str | None, file: Path | None, flag: str) -> str:
    """The passage from the flag, the file, or standard input."""
    if context is not None and file is not None:
        fail(f"give the passage once: either --context or {flag}", 2)
    if context is not None:
        return context
    if file is None and (sys.stdin is None or sys.stdin.isatty()):
        fail(f"there is no passage. Give it with --context TEXT or {flag} FILE", 2)
    try:
        data = file.read_bytes() if file is not None else sys.stdin.buffer.read()
    except OSError as error:
        fail(f"cannot read {file}: {os.strerror(error.errno or 0)}", 2)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(
            f"{file or 'standard input'} is not UTF-8 text (byte {error.start}). Convert it, "
            "for example with iconv -f GB18030 -t UTF-8",
            2,
        )
