"""Where the replicas of a service are: a list of addresses, and DNS names that lead to several."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Iterable

log = logging.getLogger(__name__)

# As long as cluster DNS keeps its answers, or less.
REFRESH_SECONDS = 2.0


def split_addresses(text: str) -> tuple[str, ...]:
    """`"a:1, b:2"` → `("a:1", "b:2")`."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def split_host(address: str) -> tuple[str, str]:
    """`"host:port"` → `(host, port)`, without the brackets of an IPv6 host."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), port


def is_literal(address: str) -> bool:
    """Whether the host of `host:port` is an IP address and no name."""
    try:
        ipaddress.ip_address(split_host(address)[0])
    except ValueError:
        return False
    return True


def join(host: str, port: str) -> str:
    """`host:port`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def resolve(address: str) -> tuple[str, ...]:
    """`ip:port` for each address that the name has; empty where there is no answer.

    A name with addresses of both kinds stands for its IPv4 ones: "localhost" is one place.
    """
    host, port = split_host(address)
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    families = {family for family, *_ in found}
    wanted = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    hosts = sorted({str(where[0]) for family, *_, where in found if family == wanted})
    return tuple(join(host, port) for host in hosts)


class Endpoints:
    """The addresses of a service's replicas, as they come and go.

    Literal addresses stay as they are. A name that leads to one place stays a name, as
    certificates have names; one that leads to several stands for all of them.
    """

    def __init__(self, addresses: Iterable[str], *, refresh_seconds: float = REFRESH_SECONDS):
        """`addresses`: host:port each."""
        self._given = tuple(dict.fromkeys(addresses))
        self._refresh_seconds = refresh_seconds
        self._found: dict[str, tuple[str, ...]] = {}
        self._looked = -refresh_seconds
        self._changes = not all(map(is_literal, self._given))

    @property
    def current(self) -> tuple[str, ...]:
        """All replicas known now, each once."""
        found = (place for given in self._given for place in self._found.get(given, (given,)))
        return tuple(dict.fromkeys(found))

    async def refresh(self) -> tuple[str, ...]:
        """Asks DNS again where it is time, and returns what is `current` then.

        Names without an answer keep the replicas that they had.
        """
        now = asyncio.get_running_loop().time()
        if self._changes and now - self._looked >= self._refresh_seconds:
            self._looked = now
            names = [given for given in self._given if not is_literal(given)]
            before = self.current
            for name, found in zip(names, await asyncio.gather(*map(resolve, names)), strict=True):
                if found:
                    self._found[name] = found if len(found) > 1 else (name,)
            if self.current != before:
                log.info("%s: %d replicas now", ", ".join(names), len(self.current))
        return self.current
