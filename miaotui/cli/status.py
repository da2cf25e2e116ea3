"""`miaotui status` and `miaotui models`: what a running gateway serves."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from miaotui.cli.asking import AskError


def fetch(url: str, path: str) -> Any:
    """The JSON under a path of the gateway. Raises `AskError`."""
    import httpx

    try:
        response = httpx.get(f"{url.rstrip('/')}{path}", timeout=5.0, trust_env=False)
        response.raise_for_status()
        return response.json()
    except httpx.HTTPStatusError as error:
        raise AskError(f"{url}{path} answered {error.response.status_code}") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise AskError(
            f"cannot reach a gateway at {url} ({error}). Start one with `miaotui up`, "
            "or say where it is with --url."
        ) from None


def show_models(console: Console, models: list[dict[str, Any]]) -> None:
    """A table of the models served."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("model", "type", "stages", "layers", "longest window", "fingerprint", ""):
        table.add_column(heading)
    for model in models:
        table.add_row(
            model["name"],
            model["model_type"],
            str(model["stages"]),
            str(model["layers"]),
            f"{model['max_length']} tokens",
            model["fingerprint"][:12],
            "[green]ready[/]" if model["ready"] else "[yellow]not ready[/]",
        )
    console.print(table, highlight=False)
