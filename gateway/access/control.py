"""Who may come in: a request's key is checked, and its limits, before anything is done."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from opentelemetry import trace

from gateway.access.caller import CALLER, Caller, forbidden
from gateway.access.keys import ApiKey, Scope
from gateway.access.limiter import Limiter
from gateway.access.store import Keyring
from gateway.errors import GatewayError
from gateway.metrics import GatewayMetrics

_BEARER = "bearer "


def key_of(authorization: str | None, x_api_key: str | None) -> str | None:
    """The key of "Authorization: Bearer KEY" or "X-API-Key: KEY"; `None` where there is none."""
    if authorization is not None and authorization[: len(_BEARER)].lower() == _BEARER:
        return authorization[len(_BEARER) :].strip()
    return None if x_api_key is None else x_api_key.strip()


class AccessControl:
    """Keys, scopes and limits, the same over HTTP and gRPC."""

    def __init__(self, keyring: Keyring, limiter: Limiter, metrics: GatewayMetrics) -> None:
        self._keyring = keyring
        self._limiter = limiter
        self._metrics = metrics

    def identify(self, text: str | None) -> ApiKey:
        """The valid key that `text` is. Raises `GatewayError` (unauthenticated)."""
        if text is None:
            self._metrics.admitted("", "no key")
            raise GatewayError("unauthenticated", "The request bears no API key.")
        key = self._keyring.find(text)
        if key is None:
            self._metrics.admitted("", "wrong key")
            raise GatewayError(
                "unauthenticated", "The API key is not valid: mistyped, or revoked by now."
            )
        return key

    @asynccontextmanager
    async def admitted(
        self, text: str | None, scope: Scope | None, *, counted: bool = True
    ) -> AsyncIterator[Caller]:
        """Lets a request in for as long as the context lasts.

        `text`: its key; `scope`: what the key must have; `counted`: whether it counts towards
        the quota. Raises `GatewayError` (unauthenticated, forbidden, rate-limited,
        quota-exceeded).
        """
        key = self.identify(text)
        trace.get_current_span().set_attribute("miaotui.key.id", key.id)
        if scope is not None and scope not in key.scopes:
            self._metrics.admitted(key.id, "forbidden")
            raise forbidden(scope)
        caller = Caller(key, self._limiter)
        if not key.limits.any:
            self._metrics.admitted(key.id, "ok")
            CALLER.set(caller)
            yield caller
            return
        try:
            ticket = await self._limiter.enter(key, counted)
        except GatewayError as error:
            self._metrics.admitted(key.id, error.kind.slug)
            raise
        self._metrics.admitted(key.id, "ok")
        CALLER.set(caller)
        try:
            yield caller
        finally:
            self._limiter.leave(key, ticket)

    async def close(self) -> None:
        """Writes down what has been counted."""
        await self._limiter.close()
