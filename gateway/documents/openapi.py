"""The part of the OpenAPI document that tells of documents."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from gateway.documents.api import MOST_FILES, MOST_LISTED
from gateway.documents.schema import (
    AddResponse,
    AddTextRequest,
    CollectionAnswer,
    CollectionList,
    CollectionQuestion,
    DocumentDetail,
    DocumentList,
    SearchRequest,
    SearchResponse,
)
from gateway.errors import KINDS
from gateway.http.problems import MEDIA_TYPE
from gateway.settings import GatewaySettings
from miaotui.retrieval.library import DEFAULT_COLLECTION
from miaotui.retrieval.reading import SUFFIXES

Json = dict[str, Any]
_REF = "#/components/schemas/{model}"
_REQUESTS = (AddTextRequest, SearchRequest, CollectionQuestion)
_RESPONSES = (
    *(AddResponse, DocumentList, DocumentDetail, CollectionList, SearchResponse),
    CollectionAnswer,
)
COLLECTION_EXAMPLE: Json = {"question": "什么是BERT模型？", "collection": "default"}
_TEXT_EXAMPLE: Json = {
    "text": "The treaty was signed in Münster on 24 October 1648.",
    "source": "history/treaty.txt",
}
_SEARCH_EXAMPLE: Json = {"query": "When was the treaty signed?", "limit": 3}


def document_paths() -> Json:
    """The paths below /v1/documents, /v1/collections and /v1/search."""
    collection: Json = {
        "name": "collection",
        "in": "query",
        "description": "The collection's name.",
        "schema": {"type": "string", "default": DEFAULT_COLLECTION},
    }
    identifier: Json = {
        "name": "id",
        "in": "path",
        "required": True,
        "description": "The document's id.",
        "schema": {"type": "string"},
    }
    page: list[Json] = [
        collection,
        {
            "name": "limit",
            "in": "query",
            "description": "Documents to return.",
            "schema": {"type": "integer", "minimum": 1, "maximum": MOST_LISTED, "default": 100},
        },
        {
            "name": "after",
            "in": "query",
            "description": "`next` of the page before.",
            "schema": {"type": "string"},
        },
    ]
    upload: Json = {
        "type": "object",
        "description": f"Files ({', '.join(SUFFIXES)}) under any field name, at most {MOST_FILES}; "
        "a file's name is its source. Files that cannot be taken are skipped, with the reason.",
        "properties": {
            "collection": {"type": "string", "default": DEFAULT_COLLECTION},
            "file": {"type": "array", "items": {"type": "string", "format": "binary"}},
        },
    }
    body: Json = {
        "required": True,
        "content": {
            **_content("AddTextRequest", _TEXT_EXAMPLE),
            "multipart/form-data": {"schema": upload},
        },
    }
    search: Json = {"required": True, "content": _content("SearchRequest", _SEARCH_EXAMPLE)}
    return {
        "/v1/documents": {
            "post": _operation(
                *("addDocuments", "Add documents to a collection", "AddResponse"),
                *(400, 408, 413, 415, 422, 503),
                requestBody=body,
                description="Adding what is there already changes nothing; a new version takes "
                "the old one's place. What has been answered is on disk, and found by its words; "
                "by meaning it is found a little later.",
            ),
            "get": _operation(
                *("listDocuments", "Documents of a collection, by source", "DocumentList"),
                *(404, 422, 503),
                parameters=page,
            ),
        },
        "/v1/documents/{id}": {
            "get": _operation(
                *("getDocument", "A document with its text", "DocumentDetail"),
                *(404, 422, 503),
                parameters=[identifier, collection],
            ),
            "delete": _operation(
                *("deleteDocument", "Remove a document", ""),
                *(404, 422, 503),
                parameters=[identifier, collection],
            ),
        },
        "/v1/collections": {
            "get": _operation(
                "listCollections", "The collections and what they hold", "CollectionList", 503
            )
        },
        "/v1/search": {
            "post": _operation(
                *("search", "Find passages", "SearchResponse"),
                *(400, 404, 408, 413, 415, 422, 503),
                requestBody=search,
            )
        },
    }


def document_schemas(settings: GatewaySettings) -> Json:
    """The schemas that those paths, and questions over collections, need."""
    _, document = TypeAdapter.json_schemas(
        [
            *((model, "validation", TypeAdapter(model)) for model in _REQUESTS),
            *((model, "serialization", TypeAdapter(model)) for model in _RESPONSES),
        ],
        ref_template=_REF,
    )
    schemas: Json = document["$defs"]
    longest = settings.max_question_characters
    schemas["CollectionQuestion"]["properties"]["question"]["maxLength"] = longest
    schemas["SearchRequest"]["properties"]["query"]["maxLength"] = longest
    schemas["AddTextRequest"]["properties"]["text"]["maxLength"] = settings.max_document_characters
    # An answer without candidates may be either: only questions are told apart by their fields.
    for name, word, parts in (
        ("AnyQuestion", "oneOf", ("QaRequest", "CollectionQuestion")),
        ("AnyAnswer", "anyOf", ("QaResponse", "CollectionAnswer")),
    ):
        schemas[name] = {
            "description": "With a passage, or over a collection.",
            word: [{"$ref": _REF.format(model=part)} for part in parts],
        }
    return schemas


def _content(name: str, example: Json | None = None) -> Json:
    content: Json = {"schema": {"$ref": _REF.format(model=name)}}
    return {"application/json": content if example is None else {**content, "example": example}}


def _operation(name: str, summary: str, response: str, *statuses: int, **more: Any) -> Json:
    headers: Json = {
        header: {"description": meaning, "schema": {"type": "string"}}
        for header, meaning in (
            ("X-Request-ID", "The request's id."),
            ("X-Trace-ID", "The trace's id."),
            ("traceparent", "W3C trace context."),
        )
    }
    retry: Json = {
        "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}
    }
    responses: Json = {
        "200" if response else "204": {
            "description": "Done.",
            "headers": headers,
            **({"content": _content(response)} if response else {}),
        }
    }
    for status in (*statuses, 500):
        titles = [kind.title for kind in KINDS.values() if kind.status == status]
        responses[str(status)] = {
            "description": "; ".join(titles),
            "headers": {**headers, **(retry if status == 503 else {})},
            "content": {MEDIA_TYPE: {"schema": {"$ref": _REF.format(model="Problem")}}},
        }
    return {
        "operationId": name,
        "summary": summary,
        "tags": ["documents"],
        "responses": responses,
        **more,
    }
