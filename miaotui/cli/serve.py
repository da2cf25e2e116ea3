"""`miaotui serve`: one service in the foreground, its flags taken from its settings."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from pydantic import AliasChoices
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

# service: (module that runs it, module and name of its settings, what it does)
SERVICES: dict[str, tuple[str, str, str, str]] = {
    "tokenizer": (
        "services.tokenizer",
        "services.tokenizer.settings",
        "TokenizerSettings",
        "Cleans and tokenises text, and maps answers back to the characters as sent.",
    ),
    "shard": (
        "services.shard",
        "services.shard.settings",
        "ShardSettings",
        "Holds one stage (a range of layers) of the model. Stage 0 queues and batches.",
    ),
    "gateway": (
        "gateway",
        "gateway.settings",
        "GatewaySettings",
        "The front door: HTTP and gRPC API, caches, web page.",
    ),
}


def serve(service: str, arguments: Sequence[str]) -> None:
    """Parses `arguments` into the service's environment and becomes the service."""
    module, settings_module, settings_name, about = SERVICES[service]
    settings: type[BaseSettings] = getattr(importlib.import_module(settings_module), settings_name)
    variables = {name: variable(settings, name) for name in settings.model_fields}

    def command(**values: str | None) -> None:
        chosen = {variables[name]: text for name, text in values.items() if text is not None}
        os.environ.update(chosen)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
        # A new process image: what this one has imported is not the service's.
        os.execv(sys.executable, [sys.executable, "-m", module])

    command.__doc__ = (
        f"{about}\n\nEvery flag can be given by its environment variable instead; "
        "the flag wins. Values are checked by the service when it starts."
    )
    parameters = [_parameter(name, settings, variables[name]) for name in settings.model_fields]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app(args=list(arguments), prog_name=f"miaotui serve {service}")


def variable(settings: type[BaseSettings], name: str) -> str:
    """The environment variable that sets a field."""
    alias = settings.model_fields[name].validation_alias
    if isinstance(alias, AliasChoices):
        return str(alias.choices[0])
    if isinstance(alias, str):
        return alias
    return f"{settings.model_config.get('env_prefix', '')}{name}".upper()


def _parameter(name: str, settings: type[BaseSettings], env: str) -> inspect.Parameter:
    info = settings.model_fields[name]
    option: Any = typer.Option(
        None,
        f"--{name.replace('_', '-')}",
        help=_help(info, env),
        show_default=False,
        metavar=_metavar(info),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=str | None
    )


def _help(info: FieldInfo, env: str) -> str:
    about = info.description or ""
    if info.is_required():
        default = "required"
    elif info.default is PydanticUndefined or info.default in (None, ""):
        default = ""
    else:
        default = f"default: {info.default}"
    return f"{about} ({'; '.join(part for part in (default, env) if part)})".strip()


def _metavar(info: FieldInfo) -> str:
    kind = info.annotation
    return {int: "NUMBER", float: "NUMBER", bool: "true|false"}.get(kind, "TEXT")  # type: ignore[arg-type]
