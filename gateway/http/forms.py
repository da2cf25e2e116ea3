"""Multipart forms within bounds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from gateway.errors import GatewayError
from gateway.http.body import limited
from gateway.settings import GatewaySettings


def is_form(request: Request) -> bool:
    """Whether the body is a multipart form."""
    media_type = request.headers.get("content-type", "").partition(";")[0]
    return media_type.strip().lower() == "multipart/form-data"


@asynccontextmanager
async def read_form(
    request: Request, settings: GatewaySettings, *, max_files: int, max_fields: int
) -> AsyncIterator[FormData]:
    """The form, whose files are gone afterwards; `settings`: of the body's size and times.

    Raises `GatewayError`.
    """
    parser = MultiPartParser(
        request.headers, limited(request, settings), max_files=max_files, max_fields=max_fields
    )
    try:
        form = await parser.parse()
    except MultiPartException:
        detail = "The multipart form cannot be read; is its boundary right?"
        raise GatewayError("malformed-body", detail) from None
    try:
        yield form
    finally:
        await form.close()
