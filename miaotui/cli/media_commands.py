"""The commands `miaotui transcribe` and `miaotui describe`."""

from __future__ import annotations

import base64
import json
import mimetypes
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from miaotui.cli.asking import DEFAULT_URL
from miaotui.cli.shared import Key, Url, fail

_File = Annotated[Path, typer.Argument(metavar="FILE", show_default=False)]
_Timeout = Annotated[float, typer.Option(help="Seconds to wait for all of it.", min=0.1)]


class Format(StrEnum):
    """How a transcript is printed."""

    text = "text"
    json = "json"
    srt = "srt"
    vtt = "vtt"


def register(app: typer.Typer) -> None:
    """Adds the commands to `miaotui`."""
    app.command(epilog=_TRANSCRIBE_EXAMPLES)(transcribe)
    app.command(epilog=_DESCRIBE_EXAMPLES)(describe)


_TRANSCRIBE_EXAMPLES = """[bold]Examples[/]

  miaotui transcribe interview.mp3

  miaotui transcribe lecture.flac --language zh --format srt > lecture.srt"""


def transcribe(
    file: _File,
    language: Annotated[
        str | None,
        typer.Option(
            "--language", "-l", help="What is spoken, such as zh; otherwise found out.", metavar="L"
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="A text that stands before, for its spelling of names.", metavar="TEXT"),
    ] = None,
    form: Annotated[Format, typer.Option("--format", "-f", help="How to print it.")] = Format.text,
    translate: Annotated[
        bool, typer.Option("--translate", help="Write it down in English.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    timeout: _Timeout = 600.0,
) -> None:
    """Write down what is said in a sound file: WAV, FLAC, OGG, MP3.

    Needs a model that hears: miaotui up --transcriber DIR.
    """
    from miaotui.client import Client, MiaotuiError

    data = _read(file)
    try:
        with Client(url, key=key or None) as client:
            told = client.transcribe(
                data,
                timeout=timeout,
                language=language,
                prompt=prompt,
                translate=translate,
                # With times and how sure it is, which plain "json" leaves out.
                response_format="verbose_json" if form is Format.json else form.value,
            )
    except MiaotuiError as error:
        fail(_told(error, "--transcriber"))
    if isinstance(told, str):
        print(told, end="" if told.endswith("\n") else "\n")
    else:
        print(json.dumps(told, ensure_ascii=False, indent=2))


_DESCRIBE_EXAMPLES = "[bold]Example[/]\n\n  miaotui describe photo.jpg"


def describe(
    file: _File,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-m", min=1, help="Most to write.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    timeout: _Timeout = 300.0,
) -> None:
    """Describe a picture: PNG, JPEG, WebP, GIF.

    Needs a model that sees: miaotui up --captioner DIR.
    """
    from miaotui.client import Client, MiaotuiError

    options: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
    try:
        with Client(url, key=key or None) as client:
            for piece in client.chat([picture_message(file)], timeout=timeout, **options):
                print(piece, end="", flush=True)
    except MiaotuiError as error:
        fail(_told(error, "--captioner"))
    print()


def picture_message(file: Path) -> dict[str, Any]:
    """A chat's message with a picture."""
    kind = mimetypes.guess_type(file.name)[0] or ""
    kind = kind if kind.startswith("image/") else "image/png"
    url = f"data:{kind};base64,{base64.b64encode(_read(file)).decode()}"
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        fail(f"cannot read {file}: {os.strerror(error.errno or 0)}", 2)


def _told(error: Exception, flag: str) -> str:
    hint = "" if getattr(error, "status", 0) else f". Start one with `miaotui up {flag} DIR`"
    return f"{error}{hint}"
