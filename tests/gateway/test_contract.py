"""The OpenAPI document against what the gateway does, and the pages that it serves."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

import jsonschema  # type: ignore[import-untyped,unused-ignore]
import pytest
from starlette.routing import Route

from gateway.desk import Desk
from gateway.errors import KINDS
from gateway.http.app import HttpApi
from gateway.http.openapi import openapi_document
from gateway.live.api import LiveFigures
from gateway.live.counters import LiveCounters
from gateway.live.traces import TraceRing
from gateway.models import Models
from gateway.settings import GatewaySettings
from tests.gateway.conftest import Gateway
from tests.gateway.fakes import Fakes


@pytest.fixture
async def document(gateway: Gateway) -> Any:
    response = await gateway.http.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    return response.json()


def validator(document: Any, name: str) -> jsonschema.Draft202012Validator:
    """Checks instances of a schema; the fields that a reply holds must all be described."""
    schemas = json.loads(json.dumps(document["components"]["schemas"]))
    for schema in schemas.values():
        if schema.get("type") == "object" and "properties" in schema:
            schema.setdefault("additionalProperties", False)
    root = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
    return jsonschema.Draft202012Validator(root)


async def test_every_route_is_described_and_nothing_else() -> None:
    settings = GatewaySettings()
    desk = Desk(settings, None, None)
    models = Models(settings)
    live = LiveFigures(settings, models, LiveCounters(), TraceRing(0))
    routes: list[Route] = HttpApi(settings, models, desk, live).routes()
    served = {
        (route.path, method.lower())
        for route in routes
        if route.include_in_schema
        for method in (route.methods or set()) - {"HEAD"}
    }
    paths = openapi_document(settings)["paths"]
    assert served == {(path, method) for path, item in paths.items() for method in item}


def test_references_and_examples_hold(document: Any) -> None:
    text = json.dumps(document)
    for name in set(re.findall(r'"#/components/schemas/(\w+)"', text)):
        jsonschema.Draft202012Validator.check_schema(document["components"]["schemas"][name])
    checked = 0
    for item in document["paths"].values():
        for operation in item.values():
            assert operation["operationId"]
            assert operation["summary"]
            contents = [r.get("content", {}) for r in operation["responses"].values()]
            contents.append(operation.get("requestBody", {}).get("content", {}))
            for content in contents:
                for media in content.values():
                    examples = [e["value"] for e in media.get("examples", {}).values()]
                    if "example" in media:
                        examples.append(media["example"])
                    for example in examples:
                        name = media["schema"]["$ref"].split("/")[-1]
                        validator(document, name).validate(example)
                        checked += 1
    assert checked == 9


def test_each_problem_is_described_where_it_can_occur(document: Any) -> None:
    responses = document["paths"]["/v1/qa"]["post"]["responses"]
    possible = {str(kind.status) for kind in KINDS.values()} - {"405", "499"}
    assert set(responses) == possible | {"200"}
    for status, response in responses.items():
        if status != "200":
            media = response["content"]["application/problem+json"]
            assert media["schema"]["$ref"].endswith("/Problem")


@pytest.mark.parametrize("language", ["english", "chinese"])
async def test_the_documented_examples_are_answered_as_documented(
    gateway: Gateway, fakes: Fakes, document: Any, language: str
) -> None:
    content = document["paths"]["/v1/qa"]["post"]["requestBody"]["content"]["application/json"]
    example = content["examples"][language]["value"]
    response = await gateway.http.post("/v1/qa", json=example)
    assert response.status_code == 200
    validator(document, "QaResponse").validate(response.json())
    assert response.json()["answers"][0]["text"] == "1925"


@pytest.mark.parametrize(
    ("path", "schema"),
    [
        ("/v1/models", "ModelList"),
        ("/readyz", "ModelList"),
        ("/v1/pipeline", "PipelineView"),
        ("/healthz", "Alive"),
    ],
)
async def test_views_are_as_documented(
    gateway: Gateway, document: Any, path: str, schema: str
) -> None:
    response = await gateway.http.get(path)
    assert response.status_code == 200
    validator(document, schema).validate(response.json())
    with pytest.raises(jsonschema.ValidationError):
        validator(document, schema).validate({**response.json(), "undescribed": 1})


async def test_batch_lines_are_as_documented(gateway: Gateway, fakes: Fakes, document: Any) -> None:
    good = {"question": "When?", "context": "In 1970."}
    response = await gateway.http.post("/v1/qa/batch", json={"requests": [good, {}]})
    lines = response.text.splitlines()
    assert len(lines) == 2
    for line in lines:
        validator(document, "BatchLine").validate(json.loads(line))


REQUESTS: list[Any] = [
    {"question": "q", "context": "c"},
    {"question": "q", "context": "c", "top_k": 50, "max_answer_length": 512},
    {"question": "q", "context": "c", "no_answer_threshold": -2.5, "normalization": "none"},
    {"question": "q", "context": "c", "no_answer_threshold": 3, "strip_markup": True},
    {"question": "q", "context": "c", "no_answer_threshold": None, "no_cache": True},
    {"question": "", "context": "c"},
    {"question": "q" * 501, "context": "c"},
    {"question": "q"},
    {"question": "q", "context": 1},
    {"question": "q", "context": "c", "top_k": 0},
    {"question": "q", "context": "c", "top_k": 51},
    {"question": "q", "context": "c", "max_answer_length": 513},
    {"question": "q", "context": "c", "max_answer_length": "1"},
    {"question": "q", "context": "c", "normalization": "nfd"},
    {"question": "q", "context": "c", "strip_markup": 0},
    {"question": "q", "context": "c", "extra": 0},
    [],
    7,
]


@pytest.mark.parametrize("body", REQUESTS, ids=lambda body: json.dumps(body)[:60])
async def test_the_gateway_takes_what_the_schema_allows_and_nothing_else(
    gateway: Gateway, fakes: Fakes, document: Any, body: Any
) -> None:
    allowed = validator(document, "QaRequest").is_valid(body)
    response = await gateway.http.post("/v1/qa", json=body)
    assert response.status_code == (200 if allowed else 422)
    if not allowed:
        validator(document, "Problem").validate(response.json())


async def test_problem_types_lead_to_a_description(gateway: Gateway, document: Any) -> None:
    for slug, kind in KINDS.items():
        response = await gateway.http.get(f"/problems/{slug}")
        assert response.json()["title"] == kind.title
        assert response.json()["advice"]


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_pages_need_nothing_from_elsewhere(gateway: Gateway, path: str) -> None:
    response = await gateway.http.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    page = response.text
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", page)
    assert "@import" not in page
    assert "url(" not in page
    assert not re.findall(r"""\son\w+\s*=\s*["']|\sstyle\s*=""", page)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
