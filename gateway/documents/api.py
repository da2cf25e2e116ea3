"""The documents' endpoints."""

from __future__ import annotations

import hashlib
import time
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.documents.answering import CollectionAnswerer, passage_views
from gateway.documents.schema import (
    ADD_RESPONSE,
    COLLECTION_ANSWER,
    COLLECTION_LIST,
    DOCUMENT_DETAIL,
    DOCUMENT_LIST,
    SEARCH_RESPONSE,
    AddedView,
    AddResponse,
    AddTextRequest,
    CollectionList,
    CollectionQuestion,
    CollectionView,
    DocumentDetail,
    DocumentList,
    DocumentView,
    SearchRequest,
    SearchResponse,
    SkippedView,
    parse,
)
from gateway.documents.service import Documents
from gateway.errors import FieldError, GatewayError
from gateway.http.body import read_json
from gateway.http.exchange import json_response, request_id, timeout_given, unless_gone
from gateway.http.forms import is_form, read_form
from gateway.schema import invalid
from gateway.settings import GatewaySettings
from miaotui.retrieval.collection import Collection
from miaotui.retrieval.errors import UnreadableError
from miaotui.retrieval.library import DEFAULT_COLLECTION
from miaotui.retrieval.stored import Document

MOST_FILES = 1000
MOST_LISTED = 1000
_LONGEST_SOURCE = 1024


class DocumentsApi:
    """Routes and what they do."""

    def __init__(
        self, settings: GatewaySettings, documents: Documents, answerer: CollectionAnswerer
    ) -> None:
        self._settings = settings
        self._uploads = settings.model_copy(update={"max_body_bytes": settings.max_upload_bytes})
        self._documents = documents
        self._answerer = answerer

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route("/v1/documents", self.add, methods=["POST"]),
            Route("/v1/documents", self.list_documents, methods=["GET"]),
            Route("/v1/documents/{id}", self.document, methods=["GET"]),
            Route("/v1/documents/{id}", self.delete, methods=["DELETE"]),
            Route("/v1/collections", self.collections, methods=["GET"]),
            Route("/v1/search", self.search, methods=["POST"]),
        ]

    async def ask(self, request: Request, body: Any) -> Response:
        """POST /v1/qa without a context."""
        timeout = timeout_given(request, self._settings.longest_timeout)
        question = parse(CollectionQuestion, body, self._settings)
        work = self._answerer.answer(question, request_id(request), timeout)
        answer = await unless_gone(request.receive, work)
        return json_response(COLLECTION_ANSWER.dump_json(answer))

    async def add(self, request: Request) -> Response:
        """POST /v1/documents"""
        if is_form(request):
            added = await self._add_files(request)
        else:
            added = await self._add_text(request)
        return json_response(ADD_RESPONSE.dump_json(added))

    async def _add_text(self, request: Request) -> AddResponse:
        body = parse(AddTextRequest, await read_json(request, self._uploads), self._settings)
        source = body.source
        if not source:
            digest = hashlib.sha256(body.text.encode("utf-8", "surrogatepass")).hexdigest()
            source = f"text:{digest[:24]}"
        try:
            added = await self._documents.add_text(body.collection, source, body.text, body.title)
        except UnreadableError as error:
            raise invalid([FieldError("/text", str(error))]) from None
        return AddResponse(body.collection, [AddedView(added.id, source, added.outcome)], [])

    async def _add_files(self, request: Request) -> AddResponse:
        async with read_form(request, self._uploads, max_files=MOST_FILES, max_fields=10) as form:
            collection = form.get("collection", DEFAULT_COLLECTION)
            files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            if not isinstance(collection, str):
                raise invalid([FieldError("/collection", "must be text, not a file")])
            if not files:
                raise invalid([FieldError("", "the form holds no file")])
            response = AddResponse(collection, [], [])
            for file in files:
                await self._add_file(file, response)
        return response

    async def _add_file(self, file: UploadFile, response: AddResponse) -> None:
        source = file.filename or ""
        if not source or len(source) > _LONGEST_SOURCE:
            reason = f"it needs a name of at most {_LONGEST_SOURCE} characters"
            response.skipped.append(SkippedView(source[:_LONGEST_SOURCE], reason))
            return
        data = await file.read()
        try:
            added = await self._documents.add_file(response.collection, source, data)
        except UnreadableError as error:
            response.skipped.append(SkippedView(source, str(error)))
        else:
            response.documents.append(AddedView(added.id, source, added.outcome))

    async def list_documents(self, request: Request) -> Response:
        """GET /v1/documents"""
        name = request.query_params.get("collection", DEFAULT_COLLECTION)
        limit = _limit(request.query_params.get("limit", "100"))
        after = request.query_params.get("after", "")
        collection = await self._existing(name)
        documents = await self._documents.run(collection.documents, limit + 1, after)
        more = documents[limit - 1].id if len(documents) > limit else None
        views = [_view(document) for document in documents[:limit]]
        return json_response(DOCUMENT_LIST.dump_json(DocumentList(name, views, more)))

    async def document(self, request: Request) -> Response:
        """GET /v1/documents/{id}"""
        name = request.query_params.get("collection", DEFAULT_COLLECTION)
        identifier = request.path_params["id"]
        collection = await self._existing(name)
        found = await self._documents.run(collection.document, identifier)
        text = await self._documents.run(collection.text, identifier)
        if found is None or text is None:
            raise GatewayError("not-found", "The collection holds no such document.")
        view = _view(found[0])
        fields = {field: getattr(view, field) for field in DocumentView.__dataclass_fields__}
        return json_response(DOCUMENT_DETAIL.dump_json(DocumentDetail(**fields, text=text)))

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/documents/{id}"""
        name = request.query_params.get("collection", DEFAULT_COLLECTION)
        if not await self._documents.delete(name, request.path_params["id"]):
            raise GatewayError("not-found", "The collection holds no such document.")
        return Response(status_code=204, headers={"Cache-Control": "no-store"})

    async def collections(self, _: Request) -> Response:
        """GET /v1/collections"""
        found = [
            CollectionView(
                name=one.name,
                documents=one.counts.documents,
                passages=one.counts.passages,
                vectors=one.counts.vectors,
                waiting=one.counts.waiting,
            )
            for one in await self._documents.collections()
        ]
        return json_response(
            COLLECTION_LIST.dump_json(CollectionList(found, self._documents.encoder))
        )

    async def search(self, request: Request) -> Response:
        """POST /v1/search"""
        body = parse(SearchRequest, await read_json(request, self._settings), self._settings)
        collection = await self._existing(body.collection)
        started = time.perf_counter()
        searched = await self._documents.search(collection, body.query, body.limit)
        elapsed = round((time.perf_counter() - started) * 1000, 3)
        views = passage_views(searched.found)
        response = SearchResponse(body.collection, views, elapsed, searched.dense)
        return json_response(SEARCH_RESPONSE.dump_json(response))

    async def _existing(self, name: str) -> Collection:
        collection = await self._documents.collection(name)
        if collection is None:
            raise GatewayError("not-found", "There is no such collection.")
        return collection


def _limit(given: str) -> int:
    # Not longer: of thousands of digits Python makes no number.
    if given.isascii() and given.isdecimal() and len(given) <= 9:
        limit = int(given)
        if 1 <= limit <= MOST_LISTED:
            return limit
    raise invalid([FieldError("/limit", f"must be a number from 1 to {MOST_LISTED}")])


def _view(document: Document) -> DocumentView:
    added = datetime.fromtimestamp(document.added, UTC).isoformat(timespec="seconds")
    return DocumentView(
        id=document.id,
        source=document.source,
        title=document.title,
        sha256=document.sha256,
        bytes=document.size,
        characters=document.characters,
        passages=document.passages,
        added_at=added,
    )
