"""Errors as RFC 9457 problem details, for every status that is not a success."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, TypeAdapter
from starlette.responses import Response

from gateway.errors import KINDS, GatewayError

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True, slots=True)
class ProblemError:
    """One fault of the request."""

    pointer: Annotated[str, Field(description="JSON pointer (RFC 6901) to the place in the body.")]
    detail: Annotated[str, Field(description="What is wrong there.")]


@dataclass(frozen=True, slots=True)
class Problem:
    """What went wrong (RFC 9457). Never holds anything that the caller sent."""

    type: Annotated[str, Field(description="Kind of problem; leads to a description.")]
    title: Annotated[str, Field(description="The kind in words.")]
    status: Annotated[int, Field(description="HTTP status.")]
    detail: Annotated[str, Field(description="What was wrong, where, and what to do.")]
    instance: Annotated[str, Field(description="This occurrence, by its request id.")]
    request_id: Annotated[str, Field(description="The request's id, for the operator.")]
    errors: Annotated[list[ProblemError], Field(description="Each fault, where there are any.")] = (
        field(default_factory=list)
    )


PROBLEM: TypeAdapter[Problem] = TypeAdapter(Problem)


def problem_of(error: GatewayError, request_id: str) -> Problem:
    """The problem details of an error."""
    kind = error.kind
    return Problem(
        type=f"/problems/{kind.slug}",
        title=kind.title,
        status=kind.status,
        detail=f"{error.detail} {kind.advice}",
        instance=f"urn:miaotui:request:{request_id}",
        request_id=request_id,
        errors=[ProblemError(fault.pointer, fault.detail) for fault in error.errors],
    )


def problem_response(
    error: GatewayError, request_id: str, headers: dict[str, str] | None = None
) -> Response:
    """The HTTP response for an error."""
    headers = dict(headers or {})
    headers["Cache-Control"] = "no-store"
    if (seconds := error.retry_after) is not None:
        headers["Retry-After"] = str(seconds)
    body = PROBLEM.dump_json(problem_of(error, request_id))
    return Response(body, error.kind.status, headers, MEDIA_TYPE)


def catalogue() -> list[dict[str, str | int]]:
    """All kinds of problems, for people."""
    return [
        {
            "type": f"/problems/{kind.slug}",
            "title": kind.title,
            "status": kind.status,
            "advice": kind.advice,
        }
        for kind in KINDS.values()
    ]
