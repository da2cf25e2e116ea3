"""The gate of the gRPC API: a key in the metadata, as in HTTP's headers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, TypeVar

from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import aio

from gateway.access.control import AccessControl, key_of
from gateway.access.keys import Scope
from gateway.errors import GatewayError

Context = aio.ServicerContext[Any, Any]
Request = TypeVar("Request")
Response = TypeVar("Response")

_SCOPES: dict[str, Scope | None] = {
    "Answer": "ask",
    "AnswerBatch": "ask",
    "Write": "write",
    "Chat": "write",
    "ListModels": None,
}
# Longer waits than this are no business of a client's automatic retries.
_LONGEST_PUSHBACK_SECONDS = 60


class RpcGate:
    """Wraps a servicer's methods. Without access control they stay as they are."""

    def __init__(self, access: AccessControl | None) -> None:
        self._access = access

    def unary(
        self, name: str, method: Callable[[Request, Context], Awaitable[Response]]
    ) -> Callable[[Request, Context], Awaitable[Response]]:
        """A method with one response."""
        access, scope = self._access, _SCOPES.get(name, "ask")
        if access is None:
            return method

        async def guarded(request: Request, context: Context) -> Response:
            try:
                async with access.admitted(_key(context), scope, counted=scope is not None):
                    return await method(request, context)
            except GatewayError as error:
                await abort(context, error)

        return guarded

    def stream(
        self, name: str, method: Callable[[Request, Context], AsyncIterator[Response]]
    ) -> Callable[[Request, Context], AsyncIterator[Response]]:
        """A method with a stream of responses."""
        access, scope = self._access, _SCOPES.get(name, "ask")
        if access is None:
            return method

        async def guarded(request: Request, context: Context) -> AsyncIterator[Response]:
            try:
                async with access.admitted(_key(context), scope):
                    responses: Any = method(request, context)
                    async with aclosing(responses):
                        async for response in responses:
                            yield response
            except GatewayError as error:
                await abort(context, error)

        return guarded


async def abort(context: Context, error: GatewayError) -> NoReturn:
    """Ends a call with an error, and says when to try again where that is known."""
    trailing: tuple[tuple[str, str | bytes], ...] = ()
    if (seconds := error.retry_after) is not None:
        status = status_pb2.Status(code=error.kind.code.value[0], message=error.message())
        delay = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=seconds))
        detail = any_pb2.Any()
        detail.Pack(delay)
        status.details.append(detail)
        # -1: do not try again by yourself.
        pushback = 1000 * seconds if seconds <= _LONGEST_PUSHBACK_SECONDS else -1
        trailing = (
            ("grpc-retry-pushback-ms", str(pushback)),
            ("grpc-status-details-bin", status.SerializeToString()),
        )
    await context.abort(error.kind.code, error.message(), trailing)


def _key(context: Context) -> str | None:
    metadata = dict(context.invocation_metadata() or ())
    return key_of(_text(metadata.get("authorization")), _text(metadata.get("x-api-key")))


def _text(value: str | bytes | None) -> str | None:
    return value.decode("latin-1") if isinstance(value, bytes) else value
