"""`miaotui keys`: who may use a gateway."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from miaotui.cli.shared import Json, fail

if TYPE_CHECKING:
    from gateway.access.keys import ApiKey, Limits

_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
_UNITS = {"sec": "s", "second": "s", "minute": "min", "hour": "h", "day": "d"}
_RATE = re.compile(r"(\d+)/(\d*)\s*([a-z]+?)s?")

keys_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Make, list and revoke API keys.

They are kept in a file, which the gateway reads: [bold]miaotui up --keys FILE[/], or \
MIAOTUI_GATEWAY_KEYS. Changes hold within a second, without a restart.""",
)


def default_file() -> Path:
    """The user's own file of keys."""
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(config).expanduser() / "miaotui" / "keys.json"


_File = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        envvar="MIAOTUI_GATEWAY_KEYS",
        help="The file; usually ~/.config/miaotui/keys.json.",
        metavar="FILE",
        show_default=False,
    ),
]


@keys_app.command(
    epilog="""[bold]Examples[/]

  miaotui keys create alice --rate 10/s --quota 10000/day

  miaotui keys create chat-bot --scopes write --tokens 200000/day --concurrency 4

  miaotui keys create alice-laptop --tenant 5f0c2a9be113   sees what that tenant's keys see"""
)
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, for the list.")],
    rate: Annotated[
        str | None,
        typer.Option(help="Most requests: 10/s, 600/minute.", metavar="N/UNIT", show_default=False),
    ] = None,
    quota: Annotated[
        str | None, typer.Option(help="Most requests a day.", metavar="N/day", show_default=False)
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Most generated tokens a day.", metavar="N/day", show_default=False),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Most requests at once.", min=1, show_default=False)
    ] = None,
    scopes: Annotated[
        str, typer.Option(help="Of ask, write, documents, observe; separated by commas.")
    ] = "ask,write,documents",
    tenant: Annotated[
        str | None,
        typer.Option(
            help="Whose documents and cached answers it sees; usually its own. "
            "default: those of a gateway without keys.",
            metavar="TENANT",
            show_default=False,
        ),
    ] = None,
    keys: _File = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it, this one time. Only a hash of it is kept."""
    from gateway.access.keys import make_key

    try:
        made, text = make_key(
            name,
            tenant=tenant,
            scopes=_scopes(scopes),
            limits=_limits(rate, quota, tokens, concurrency),
        )
    except ValueError as error:
        fail(_reason(error), 2)
    _keep(made, text, keys, as_json)


@keys_app.command()
def rotate(
    key_id: Annotated[str, typer.Argument(help="The old key's id.", metavar="ID")],
    keys: _File = None,
    as_json: Json = False,
) -> None:
    """Make a key that is as an old one: its name, tenant, scopes and limits.

    The old one holds until it is revoked.
    """
    from gateway.access.keys import make_key

    old = next((key for key in _read(keys) if key.id == key_id), None)
    if old is None:
        _unknown(key_id)
    made, text = make_key(old.name, tenant=old.tenant, scopes=old.scopes, limits=old.limits)
    _keep(made, text, keys, as_json)


@keys_app.command("list")
def list_keys(keys: _File = None, as_json: Json = False) -> None:
    """List the keys, without their secrets."""
    found = _read(keys)
    if as_json:
        print(json.dumps([_view(key) for key in found], ensure_ascii=False, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("id", "name", "tenant", "scopes", "limits", "created", ""):
        table.add_column(heading, overflow="fold")
    for key in found:
        tenant = "its own" if key.tenant == key.id else key.tenant
        revoked = f"revoked {key.revoked:%Y-%m-%d}" if key.revoked else ""
        table.add_row(
            *(key.id, Text(key.name), tenant, ",".join(key.scopes), _told(key.limits)),
            *(f"{key.created:%Y-%m-%d}", Text(revoked, "red")),
        )
    Console().print(table, highlight=False)


@keys_app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id.", metavar="ID")],
    keys: _File = None,
) -> None:
    """End a key's validity. Gateways know within a second."""
    from gateway.access.store import KeyFile, KeyFileError

    try:
        revoked = KeyFile(keys or default_file()).revoke(key_id)
    except KeyFileError as error:
        fail(error)
    if revoked is None:
        _unknown(key_id)
    Console().print(f"revoked {revoked.id} ({revoked.name})", markup=False, highlight=False)


def _unknown(key_id: str) -> NoReturn:
    fail(f"there is no key {key_id}; `miaotui keys list` shows the ids", 2)


def _read(file: Path | None) -> list[ApiKey]:
    from gateway.access.store import KeyFile, KeyFileError

    try:
        return KeyFile(file or default_file()).keys()
    except KeyFileError as error:
        fail(error)


def _keep(key: ApiKey, text: str, file: Path | None, as_json: bool) -> None:
    from gateway.access.store import KeyFile, KeyFileError

    path = file or default_file()
    try:
        KeyFile(path).add(key)
    except KeyFileError as error:
        fail(error)
    if as_json:
        print(json.dumps({**_view(key), "key": text}, ensure_ascii=False, indent=2))
        return
    told = f"{key.name}: {_told(key.limits) or 'no limits'}; may {', '.join(key.scopes)}"
    Console(stderr=True).print(
        f"{told}\nkept in {path}; the key itself is shown this once:",
        style="dim",
        markup=False,
        highlight=False,
    )
    print(text)


def _view(key: ApiKey) -> dict[str, Any]:
    return key.model_dump(mode="json", exclude={"secret_sha256"})


def _told(limits: Limits) -> str:
    parts = []
    if limits.rate is not None:
        units = {seconds: unit for unit, seconds in _SECONDS.items()}
        unit = units.get(int(limits.rate.seconds), f"{limits.rate.seconds:g}s")
        parts.append(f"{limits.rate.count}/{unit}")
    if limits.requests_per_day is not None:
        parts.append(f"{limits.requests_per_day}/day")
    if limits.tokens_per_day is not None:
        parts.append(f"{limits.tokens_per_day} tokens/day")
    if limits.concurrency is not None:
        parts.append(f"{limits.concurrency} at once")
    return ", ".join(parts)


def _scopes(given: str) -> Any:
    from gateway.access.keys import SCOPES

    wanted = [scope.strip() for scope in given.split(",") if scope.strip()]
    unknown = [scope for scope in wanted if scope not in SCOPES]
    if unknown or not wanted:
        fail(f"--scopes takes some of {', '.join(SCOPES)}, separated by commas", 2)
    return tuple(scope for scope in SCOPES if scope in wanted)


def _limits(
    rate: str | None, quota: str | None, tokens: str | None, concurrency: int | None
) -> Limits:
    from gateway.access.keys import Limits, Rate

    return Limits(
        rate=None if rate is None else Rate(**_rate(rate, "--rate")),
        requests_per_day=_daily(quota, "--quota"),
        tokens_per_day=_daily(tokens, "--tokens"),
        concurrency=concurrency,
    )


def _daily(given: str | None, flag: str) -> int | None:
    if given is None:
        return None
    rate = _rate(given if "/" in given else f"{given}/day", flag)
    if rate["seconds"] != _SECONDS["d"]:
        fail(f"{flag} is a day's: {rate['count']}/day", 2)
    return int(rate["count"])


def _rate(given: str, flag: str) -> dict[str, Any]:
    found = _RATE.fullmatch(given.strip().lower().replace(" ", ""))
    unit = found and _UNITS.get(found[3], found[3])
    if found is None or unit not in _SECONDS or int(found[1]) < 1 or found[2] == "0":
        fail(f"{flag} takes a number and a time, such as 10/s, 600/minute or 10000/day", 2)
    return {"count": int(found[1]), "seconds": int(found[2] or 1) * _SECONDS[unit]}


def _reason(error: ValueError) -> str:
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    fault = error.errors()[0]
    if fault["loc"] == ("tenant",):
        return "--tenant takes at most 64 of a-z, 0-9 and -, such as a key's id"
    return f"{'/'.join(map(str, fault['loc']))}: {fault['msg']}"
