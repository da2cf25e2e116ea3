"""Who a request comes from, known to all that is done for it.

In a context variable, so that nothing on the way (caches, documents, generator) can be called
without it: what forgets to ask gets the caller's data, never another's.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol

from gateway.access.keys import DEFAULT_TENANT, ApiKey, Scope
from gateway.errors import GatewayError


class Meter(Protocol):
    """Counts what a key uses."""

    def spend(self, key: ApiKey, requests: int) -> None:
        """Counts further requests. Raises `GatewayError` where the quota does not hold them."""

    def tokens(self, key: ApiKey, count: int) -> None:
        """Counts tokens that were written."""


class Caller:
    """A request's key, and the meter that it runs on."""

    __slots__ = ("_meter", "key")

    def __init__(self, key: ApiKey, meter: Meter) -> None:
        self.key = key
        self._meter = meter

    def spend(self, requests: int) -> None:
        """Counts requests beyond the one that was let in (a batch's). Raises `GatewayError`."""
        if requests > 0:
            self._meter.spend(self.key, requests)

    def wrote(self, tokens: int) -> None:
        """Counts tokens that were generated for it."""
        if tokens > 0:
            self._meter.tokens(self.key, tokens)


# None: the gateway asks for no keys, or this is work of its own.
CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


def current_tenant() -> str:
    """Whose data the current request sees; empty: those that need no key."""
    caller = CALLER.get()
    if caller is None or caller.key.tenant == DEFAULT_TENANT:
        return ""
    return caller.key.tenant


def require(scope: Scope) -> None:
    """Raises `GatewayError` (forbidden) where the current request's key lacks `scope`."""
    caller = CALLER.get()
    if caller is not None and scope not in caller.key.scopes:
        raise forbidden(scope)


def forbidden(scope: Scope) -> GatewayError:
    """The error for a key without a scope."""
    return GatewayError("forbidden", f'The API key lacks the scope "{scope}".')


def spend(requests: int) -> None:
    """Counts requests beyond the current one, where there is a key. Raises `GatewayError`."""
    caller = CALLER.get()
    if caller is not None:
        caller.spend(requests)


def current_caller() -> Caller | None:
    """Who the current request comes from; `None` where there are no keys."""
    return CALLER.get()
