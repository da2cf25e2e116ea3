"""The command `miaotui write`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from miaotui.cli.asking import DEFAULT_URL
from miaotui.cli.shared import Json, Key, Url, fail, read_passage

EPILOG = """[bold]Examples[/]

  miaotui write "Explain tides to a child."

  miaotui write "Once upon a time" --raw --max-tokens 80 --temperature 0.8

  miaotui write --scenario translate --to zh --file letter.txt

  miaotui write --scenario summarise --file article.txt"""


def write(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to write; without it, standard input.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", "-f", help="A file, in UTF-8, whose text follows the prompt.", metavar="FILE"
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", "-s", help="How to write, for a chat model.", show_default=False),
    ] = None,
    scenario: Annotated[
        str | None,
        typer.Option(
            "--scenario",
            help="A ready prompt: answer, chat, summarise, translate or write.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="With --scenario translate: the language, such as zh or French.",
            metavar="LANGUAGE",
            show_default=False,
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-m", min=1, help="Most to write.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", "-t", min=0.0, help="0: always the likeliest word."),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Only the likeliest words that sum up to this.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal texts.")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this text; may be given several times.", metavar="TEXT"),
    ] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    key: Key = "",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for all of it.")] = 300.0,
) -> None:
    """Let a running Miaotui write, and show the text as it comes.

    Needs a model that writes: miaotui up --generator DIR. Ctrl-C ends the text.
    """
    from miaotui.cli.writing import Asking, run_write

    if prompt is None and file is None:
        prompt = read_passage(None, None, "--file")
    parts = [prompt or "", read_passage(None, file, "--file") if file is not None else ""]
    if raw and system is not None:
        fail("--system is for chats; with --raw, write it into the prompt", 2)
    if raw and (scenario is not None or to is not None):
        fail("--scenario and --to are for chats; with --raw, write it into the prompt", 2)
    if to is not None and scenario != "translate":
        fail("--to goes with --scenario translate", 2)
    options = {
        "scenario": scenario,
        "to": to,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
    }
    asked = Asking("\n\n".join(part for part in parts if part), system, raw, options, timeout)
    problem, code = run_write(url, asked, as_json=as_json, key=key)
    if problem:
        fail(problem, code)
    raise typer.Exit(code)
