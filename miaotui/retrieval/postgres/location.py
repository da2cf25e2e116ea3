"""Where a PostgreSQL store is, and what of that may be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from urllib.parse import parse_qs, unquote, urlsplit

_SCHEMES = ("postgresql://", "postgres://")
_PORTS = re.compile(r"[\d,]*")


def is_postgres(location: str) -> bool:
    """Whether this names a PostgreSQL database and not a folder."""
    return location.startswith(_SCHEMES)


@dataclass(frozen=True, slots=True)
class PostgresLocation:
    """A database. `shown`: its name for people, without user and password."""

    url: str = field(repr=False)
    password: str = field(repr=False)
    options: frozenset[str]
    shown: str

    @classmethod
    def parse(cls, url: str) -> PostgresLocation:
        """Takes `postgresql://user:password@host:port/database?option=…` apart.

        Raises `ValueError`, whose message quotes nothing of the URL: in one that is wrong, any
        part may be the password.
        """
        if find_spec("psycopg") is None:
            raise ValueError("PostgreSQL needs psycopg: pip install 'miaotui[postgres]'")
        try:
            parts = urlsplit(url)
            options = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
        except ValueError:
            raise _WRONG from None
        user, _, server = parts.netloc.rpartition("@")
        host, colon, port = server.rpartition(":")
        if not colon or server.endswith("]"):
            host, port = server, ""
        # An unescaped "@", "/", "?" or "#" in a password moves the rest of it into these.
        odd = "@" in user or "@" in parts.path + parts.query or parts.fragment
        # Of several hosts, each may have a port of its own.
        ports = ",".join([*re.findall(r":([^,\]]*)(?=,)", host), port])
        if odd or not _PORTS.fullmatch(ports):
            raise _WRONG
        password = unquote(user.partition(":")[2]) or options.get("password", [""])[0]
        host = unquote(host) or options.get("host", ["localhost"])[0]
        port = port or options.get("port", [""])[0]
        name = unquote(parts.path.strip("/")) or options.get("dbname", [""])[0]
        shown = f"PostgreSQL at {host}{f':{port}' if port else ''}"
        shown += f", database {name}" if name else ""
        return cls(url, password, frozenset(options), shown)


_WRONG = ValueError(
    "a PostgreSQL store is named as postgresql://user:password@host:port/database; in user and "
    "password, @ : / ? # and % are written as %40 %3A %2F %3F %23 and %25"
)
