"""What can go wrong with a request, once for HTTP and gRPC.

Each problem has a slug (the end of its RFC 9457 `type`), an HTTP status and a gRPC
status. Details are written here and never hold what a caller sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc
from grpc import aio


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of problem."""

    slug: str
    title: str
    status: int
    code: grpc.StatusCode
    advice: str


_C = grpc.StatusCode
_ALL = (
    Kind(
        *("malformed-body", "The body is not valid JSON", 400, _C.INVALID_ARGUMENT),
        "Send one JSON object in UTF-8, every field once, without NaN or Infinity.",
    ),
    Kind(
        *("malformed-http", "The request is not valid HTTP", 400, _C.INVALID_ARGUMENT),
        "Speak HTTP/1.1; if you meant HTTPS, or gRPC, see that the address is right.",
    ),
    Kind(
        *("invalid-header", "A request header is not valid", 400, _C.INVALID_ARGUMENT),
        "Correct the header that `detail` names.",
    ),
    Kind(
        *("unauthenticated", "A valid API key is needed", 401, _C.UNAUTHENTICATED),
        'Send your key as "Authorization: Bearer mt_…" or "X-API-Key: mt_…".',
    ),
    Kind(
        *("forbidden", "The API key may not do this", 403, _C.PERMISSION_DENIED),
        "Ask the operator for a key with the scope that `detail` names.",
    ),
    Kind(*("not-found", "There is nothing here", 404, _C.NOT_FOUND), "See /docs for the paths."),
    Kind(
        *("method-not-allowed", "The method is not allowed here", 405, _C.UNIMPLEMENTED),
        "Use a method that the Allow header names.",
    ),
    Kind(
        *("headers-timeout", "The headers did not arrive in time", 408, _C.DEADLINE_EXCEEDED),
        "Send the headers without pauses.",
    ),
    Kind(
        *("body-timeout", "The body did not arrive in time", 408, _C.DEADLINE_EXCEEDED),
        "Send the body without pauses.",
    ),
    Kind(
        *("body-too-large", "The body is too large", 413, _C.INVALID_ARGUMENT),
        "Send less text at once, for example one section of the passage.",
    ),
    Kind(
        *("unsupported-media-type", "The body's type is not supported", 415, _C.INVALID_ARGUMENT),
        "Send Content-Type: application/json, in UTF-8 and without Content-Encoding.",
    ),
    Kind(
        *("invalid-request", "The request is not valid", 422, _C.INVALID_ARGUMENT),
        "Correct the places that `errors` points to.",
    ),
    Kind(
        *("context-too-long", "The prompt is too long", 422, _C.INVALID_ARGUMENT),
        "Shorten the prompt, or ask for fewer tokens.",
    ),
    Kind(
        *("rate-limited", "The API key asks too fast", 429, _C.RESOURCE_EXHAUSTED),
        "Ask again after Retry-After seconds.",
    ),
    Kind(
        *("quota-exceeded", "The API key's quota is used up", 429, _C.RESOURCE_EXHAUSTED),
        "Ask again after Retry-After seconds, when the next day begins, or ask for a larger quota.",
    ),
    Kind(
        *("headers-too-large", "The request's headers are too large", 431, _C.INVALID_ARGUMENT),
        "Send fewer or shorter headers, and a shorter path.",
    ),
    Kind(
        *("model-not-found", "There is no such model", 404, _C.NOT_FOUND),
        "See /v1/models for what is served.",
    ),
    Kind(
        *("client-closed", "The caller went away", 499, _C.CANCELLED),
        "Nobody reads this: the caller had closed the connection.",
    ),
    Kind(
        *("internal", "An error inside of Miaotui", 500, _C.INTERNAL),
        "Report it with the request id; asking again may help.",
    ),
    Kind(
        *("service-failed", "A service behind the gateway failed", 502, _C.INTERNAL),
        "Report it with the request id; asking again may help.",
    ),
    Kind(
        *("unavailable", "Miaotui is not ready", 503, _C.UNAVAILABLE),
        "Ask again after Retry-After seconds; /readyz tells the reason.",
    ),
    Kind(
        *("overloaded", "Miaotui has too much to do", 503, _C.RESOURCE_EXHAUSTED),
        "Ask again after Retry-After seconds, or ask less at once.",
    ),
    Kind(
        *("timeout", "The answer took too long", 504, _C.DEADLINE_EXCEEDED),
        "Ask with a shorter passage, or with a longer X-Request-Timeout.",
    ),
)
KINDS: Mapping[str, Kind] = {kind.slug: kind for kind in _ALL}
RETRY_AFTER_SECONDS = 1


@dataclass(frozen=True, slots=True)
class FieldError:
    """One fault of a request: a JSON pointer (RFC 6901) into it, and what is wrong there."""

    pointer: str
    detail: str


class GatewayError(Exception):
    """A request that gets no answer, and why."""

    def __init__(
        self,
        slug: str,
        detail: str,
        errors: Sequence[FieldError] = (),
        *,
        wait_seconds: float | None = None,
    ) -> None:
        """`slug`: one of `KINDS`; `detail`: for the caller, without anything that it sent.

        `wait_seconds`: when asking again makes sense, where that is known.
        """
        super().__init__(detail)
        self._wait_seconds = wait_seconds
        self.kind = KINDS[slug]
        self.detail = detail
        self.errors = tuple(errors)

    @property
    def retry_after(self) -> int | None:
        """Seconds after which asking again makes sense; `None` where it does not."""
        if self._wait_seconds is not None:
            return max(1, math.ceil(self._wait_seconds))
        return RETRY_AFTER_SECONDS if self.kind.status in (429, 503) else None

    def message(self) -> str:
        """The detail and every fault in one line, for gRPC."""
        faults = "; ".join(f"{error.pointer or '/'}: {error.detail}" for error in self.errors)
        return f"{self.detail} {faults}".strip()


# These messages come from our own services, which promise to echo nothing.
_PASSED_ON = (_C.INVALID_ARGUMENT, _C.OUT_OF_RANGE)


def from_rpc(error: aio.AioRpcError, service: str) -> GatewayError:
    """What a failed call to `service` ("tokenizer", "stage 0") means to the caller.

    A full queue becomes 503 and not 429: the load is the service's, not this caller's.
    """
    code = error.code()
    if code in _PASSED_ON:
        detail = (error.details() or "The text cannot be processed.").strip()
        return GatewayError("invalid-request", detail, [FieldError("", detail)])
    if code is _C.RESOURCE_EXHAUSTED:
        return GatewayError("overloaded", f"The queue of {service} is full.")
    if code is _C.UNAVAILABLE:
        return GatewayError("unavailable", f"The service {service} cannot be reached or is busy.")
    if code is _C.DEADLINE_EXCEEDED:
        return GatewayError("timeout", f"No answer from {service} within the request's time.")
    return GatewayError("service-failed", f"The service {service} failed with {code.name}.")
