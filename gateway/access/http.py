"""The gate of the HTTP API: which paths need a key, and with which scope."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.access import keys
from gateway.access.caller import CALLER
from gateway.access.control import AccessControl, key_of

API = "/v1"
METRICS = "/metrics"

# (method or "", beginning of the path, scope); the first that fits holds. None: any key.
_RULES: tuple[tuple[str, str, keys.Scope | None], ...] = (
    ("", "/v1/chat/completions", "write"),
    ("", "/v1/completions", "write"),
    ("", "/v1/audio/", "write"),
    ("GET", "/v1/documents", "ask"),
    ("HEAD", "/v1/documents", "ask"),
    ("", "/v1/documents", "documents"),
    ("", "/v1/collections", "ask"),
    ("", "/v1/models", None),
    ("", "/v1/scenarios", None),
    ("", "/v1/pipeline", None),
    # What other callers do shows in there.
    ("", "/v1/live", "observe"),
    ("", "/v1/traces", "observe"),
    ("", METRICS, "observe"),
    ("", "", "ask"),
)


def guarded(path: str, open_metrics: bool = False) -> bool:
    """Whether a path needs a key; health, the page and the API's description do not."""
    return path.startswith(API) or (path == METRICS and not open_metrics)


def scope_of(method: str, path: str) -> keys.Scope | None:
    """The scope that a request needs; `None`: any valid key will do."""
    for wanted, beginning, scope in _RULES:
        if wanted in ("", method) and path.startswith(beginning):
            return scope
    raise AssertionError("the last rule fits everything")


class Gate:
    """ASGI middleware. Errors are raised, and put into words by what is around it."""

    def __init__(self, app: ASGIApp, access: AccessControl, *, open_metrics: bool) -> None:
        self._app = app
        self._access = access
        self._open_metrics = open_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request. Raises `GatewayError` where it may not come in."""
        # An event loop may call a connection's next request in the context of the last one.
        CALLER.set(None)
        path, method = scope["path"], scope["method"]
        if not guarded(path, self._open_metrics):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        key = key_of(_text(headers, b"authorization"), _text(headers, b"x-api-key"))
        counted = method not in ("GET", "HEAD")
        async with self._access.admitted(key, scope_of(method, path), counted=counted):
            await self._app(scope, receive, send)


def _text(headers: dict[bytes, bytes], name: bytes) -> str | None:
    value = headers.get(name)
    return None if value is None else value.decode("latin-1")
