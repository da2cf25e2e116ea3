"""`miaotui write`: lets a running gateway write, and shows the text as it comes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from miaotui.client import Client, MiaotuiError, TextStream

_INTERRUPTED = 130


@dataclass(frozen=True)
class Asking:
    """What is to be written."""

    prompt: str
    system: str | None
    raw: bool
    """Whether the prompt is continued as it is, without a chat template."""
    options: Mapping[str, Any]
    """Of OpenAI's API; `None` leaves one to the gateway."""
    timeout: float


def run_write(url: str, asked: Asking, *, as_json: bool, key: str = "") -> tuple[str, int]:
    """Writes to standard output; returns what went wrong (empty: nothing) and an exit code."""
    began = time.perf_counter()
    first: float | None = None
    try:
        with Client(url, key=key) as client, _stream(client, asked) as stream:
            for piece in stream:
                first = first or time.perf_counter()
                if not as_json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
    except MiaotuiError as error:
        hint = "" if error.status else ". Start one with `miaotui up --generator DIR`"
        return f"{error}{hint}", 1
    except KeyboardInterrupt:
        return "", _INTERRUPTED
    ended = time.perf_counter()
    if as_json:
        body = {
            "text": stream.text,
            "finish_reason": stream.finish_reason,
            "usage": stream.usage,
            "first_token_seconds": round((first or ended) - began, 4),
            "seconds": round(ended - began, 4),
        }
        print(json.dumps(body, ensure_ascii=False, indent=2))
        return "", 0
    print()
    if sys.stderr.isatty():
        Console(stderr=True).print(_figures(stream, began, first or ended, ended), style="dim")
    return "", 0


def _stream(client: Client, asked: Asking) -> TextStream:
    options = {name: value for name, value in asked.options.items() if value is not None}
    if asked.raw:
        return client.write(asked.prompt, timeout=asked.timeout, **options)
    messages = [{"role": "user", "content": asked.prompt}]
    if asked.system is not None:
        messages.insert(0, {"role": "system", "content": asked.system})
    return client.chat(messages, timeout=asked.timeout, **options)


def _figures(stream: TextStream, began: float, first: float, ended: float) -> str:
    tokens = stream.usage.get("completion_tokens", 0)
    rate = (tokens - 1) / (ended - first) if tokens > 1 and ended > first else 0.0
    why = " (cut off by --max-tokens or the context)" if stream.finish_reason == "length" else ""
    return (
        f"{tokens} tokens{why}, the first after {(first - began) * 1000:.0f} ms, "
        f"then {rate:.0f} a second"
    )
