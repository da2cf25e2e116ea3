"""`miaotui status` and `miaotui models`: what a running gateway serves."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from miaotui.cli.asking import AskError, problem_text
from miaotui.cli.shared import headers_with

_DOES = {
    "extractive": "finds answers",
    "generative": "writes text",
    "transcribing": "writes down what is said",
    "captioning": "describes pictures",
    "embedding": "finds documents by meaning",
}


def fetch(url: str, path: str, key: str = "") -> Any:
    """The JSON under a path of the gateway. Raises `AskError`."""
    import httpx

    try:
        response = httpx.get(
            f"{url.rstrip('/')}{path}", timeout=5.0, trust_env=False, headers=headers_with(key)
        )
        response.raise_for_status()
        return response.json()
    except httpx.HTTPStatusError as error:
        status, content = error.response.status_code, error.response.content
        raise AskError(problem_text(f"{url}{path}", status, content)) from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise AskError(
            f"cannot reach a gateway at {url} ({error}). Start one with `miaotui up`, "
            "or say where it is with --url."
        ) from None


def show_models(console: Console, models: list[dict[str, Any]]) -> None:
    """A table of the models served."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("model", "type", "does", "stages", "layers", "longest", "fingerprint", ""):
        table.add_column(heading)
    for model in models:
        table.add_row(
            model["name"],
            model["model_type"],
            _DOES[model["kind"]],
            str(model["stages"]),
            str(model["layers"]),
            f"{model['max_length']} tokens",
            model["fingerprint"][:12],
            "[green]ready[/]" if model["ready"] else "[yellow]not ready[/]",
        )
    console.print(table, highlight=False)


def show_pipelines(console: Console, pipeline: dict[str, Any]) -> bool:
    """A table of the stages of each model, and what they are doing. Whether all that answer are
    ready."""
    pipelines = [pipeline, *pipeline["others"]]
    for index, one in enumerate(pipelines):
        if index:
            console.print()
        _show(console, one)
    return all_ready(pipeline)


def all_ready(pipeline: dict[str, Any]) -> bool:
    """Whether all models that answer are ready, which they are without the encoder, too."""
    pipelines = [pipeline, *pipeline["others"]]
    return all(one["ready"] for one in pipelines if one["kind"] != "embedding")


def _show(console: Console, pipeline: dict[str, Any]) -> None:
    console.print(f"[bold]{_DOES[pipeline['kind']]}[/]", end=": ")
    if pipeline["ready"]:
        console.print("[bold green]ready[/]")
    else:
        console.print("[bold yellow]not ready[/]", end=": ")
        console.print(pipeline["reason"], markup=False, highlight=False)
    if pipeline["stages"]:
        console.print(_stages(pipeline), highlight=False)
    what = "windows" if pipeline["kind"] == "extractive" else "texts"
    done = f"{pipeline['tokens_total']:,} tokens done"
    if pipeline["kind"] in ("extractive", "embedding"):
        done = f"{pipeline['sequences_total']:,} ({pipeline['tokens_total']:,} tokens) done"
    console.print(
        f"{pipeline['queued_sequences']} {what} wait, {pipeline['running_sequences']} are in the "
        f"pipeline; {done}",
        style="dim",
        highlight=False,
    )


def _stages(pipeline: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage", justify="right")
    table.add_column("layers")
    table.add_column("memory", justify="right")
    for heading in ("share", "computes in", "sends", "on"):
        table.add_column(heading)
    for stage in pipeline["stages"]:
        table.add_row(
            str(stage["index"]),
            f"{stage['first_layer']}–{stage['end_layer'] - 1}",
            f"{stage['parameter_bytes'] / 1e6:,.1f} MB",
            f"{stage['parameter_bytes'] / max(pipeline['model_parameter_bytes'], 1):.0%}",
            stage["compute_dtype"],
            stage["wire_dtype"],
            stage["device"],
        )
    return table
