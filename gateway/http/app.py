"""The HTTP API: routes and what they do."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic_core import to_json
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.access.caller import spend
from gateway.access.control import AccessControl
from gateway.access.http import Gate
from gateway.batch import Outcome, run_batch
from gateway.desk import Desk
from gateway.documents.api import DocumentsApi
from gateway.errors import FieldError, GatewayError
from gateway.http.body import read_json
from gateway.http.exchange import SSE, json_response, request_id, timeout_given, unless_gone
from gateway.http.middleware import RequestScope
from gateway.http.openai.api import OpenAiApi
from gateway.http.openai.audio import AudioApi
from gateway.http.openapi import openapi_document
from gateway.http.page import WebFiles
from gateway.http.problems import catalogue, problem_of
from gateway.http.routing import Routing
from gateway.http.views import (
    ALIVE,
    BATCH_LINE,
    MODELS,
    PIPELINE,
    SCENARIO_LIST,
    Alive,
    BatchLine,
    models_of,
    pipeline_of,
    scenario_list,
)
from gateway.live.api import LiveFigures
from gateway.metrics import GatewayMetrics
from gateway.models import Models
from gateway.schema import QaRequest, QaResponse, invalid, parse_request
from gateway.settings import GatewaySettings

NDJSON = "application/x-ndjson"
_ENCODER = msgspec.json.Encoder()
WEB = Path(__file__).parent.parent / "web"


class HttpApi:
    """The endpoints."""

    def __init__(
        self, settings: GatewaySettings, models: Models, desk: Desk, live: LiveFigures
    ) -> None:
        self._settings = settings
        self._live = live
        self._models = models
        self._desk = desk
        self._openai = OpenAiApi(settings, models, desk.generator, desk.captioner)
        self._audio = AudioApi(settings, desk.transcriber)
        self._documents = DocumentsApi(settings, desk.documents, desk.collections)
        self._openapi = to_json(openapi_document(settings))
        self._web = WebFiles(WEB, settings.cors_allowed)
        self._problems = {str(entry["type"]): entry for entry in catalogue()}

    async def ask(self, request: Request) -> Response:
        """POST /v1/qa"""
        timeout = timeout_given(request, self._settings.longest_timeout)
        body = await read_json(request, self._settings)
        if isinstance(body, dict) and "context" not in body:
            return await self._documents.ask(request, body)
        question = parse_request(body, self._settings)
        work = self._desk.answer(question, request_id(request), timeout)
        answer = await unless_gone(request.receive, work)
        return json_response(_ENCODER.encode(answer))

    async def ask_batch(self, request: Request) -> Response:
        """POST /v1/qa/batch"""
        timeout = timeout_given(request, self._settings.longest_timeout)
        items = _items(await read_json(request, self._settings), self._settings)
        spend(len(items) - 1)

        def parse(index: int, item: Any) -> QaRequest:
            return parse_request(item, self._settings, f"/requests/{index}")

        results = run_batch(
            self._desk.answer,
            items,
            parse,
            request_id(request),
            timeout,
            self._settings.batch_concurrency,
        )
        accepted = request.headers.get("accept", "")
        return _ResultStream(results, request_id(request), SSE if SSE in accepted else NDJSON)

    async def healthz(self, _: Request) -> Response:
        """GET /healthz"""
        return json_response(ALIVE.dump_json(Alive("ok")))

    async def readyz(self, request: Request) -> Response:
        """GET /readyz"""
        if not self._models.ready:
            raise GatewayError("unavailable", self._models.reason)
        return json_response(MODELS.dump_json(models_of(self._models)))

    async def metrics(self, _: Request) -> Response:
        """GET /metrics"""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    async def list_models(self, _: Request) -> Response:
        """GET /v1/models"""
        return json_response(MODELS.dump_json(models_of(self._models)))

    async def scenarios(self, _: Request) -> Response:
        """GET /v1/scenarios"""
        return json_response(SCENARIO_LIST.dump_json(scenario_list()))

    async def pipeline(self, _: Request) -> Response:
        """GET /v1/pipeline"""
        return json_response(PIPELINE.dump_json(pipeline_of(self._models)))

    async def openapi(self, _: Request) -> Response:
        """GET /openapi.json"""
        return json_response(self._openapi)

    async def problem(self, request: Request) -> Response:
        """GET /problems/{slug}"""
        entry = self._problems.get(f"/problems/{request.path_params['slug']}")
        if entry is None:
            raise GatewayError("not-found", "There is no such kind of problem.")
        return json_response(to_json(entry))

    async def page(self, request: Request) -> Response:
        """GET /"""
        return self._web.page("index.html", request)

    async def docs(self, request: Request) -> Response:
        """GET /docs"""
        return self._web.page("docs.html", request)

    def routes(self) -> list[Route]:
        """All routes; those of /openapi.json are checked against it by a test."""
        return [
            Route("/v1/qa", self.ask, methods=["POST"]),
            Route("/v1/qa/batch", self.ask_batch, methods=["POST"]),
            *self._documents.routes(),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{model}", self._openai.model),
            Route("/v1/chat/completions", self._openai.chat, methods=["POST"]),
            Route("/v1/completions", self._openai.completions, methods=["POST"]),
            *self._audio.routes(),
            Route("/v1/scenarios", self.scenarios),
            Route("/v1/pipeline", self.pipeline),
            *self._live.routes(),
            Route("/healthz", self.healthz),
            Route("/readyz", self.readyz),
            Route("/metrics", self.metrics),
            Route("/problems/{slug}", self.problem),
            Route("/openapi.json", self.openapi),
            Route("/", self.page, include_in_schema=False),
            Route("/docs", self.docs, include_in_schema=False),
            Route("/web/{name:path}", self._web.file, include_in_schema=False),
        ]


def build_app(
    settings: GatewaySettings,
    models: Models,
    desk: Desk,
    metrics: GatewayMetrics,
    live: LiveFigures,
    access: AccessControl | None = None,
) -> ASGIApp:
    """The ASGI application; `access`: who may use it, `None`: everybody."""
    routes = HttpApi(settings, models, desk, live).routes()
    app: ASGIApp = Routing(routes)
    if access is not None:
        app = Gate(app, access, open_metrics=settings.open_metrics)
    paths = {route.endpoint: route.path for route in routes}
    app = RequestScope(app, metrics, paths)
    if settings.cors_allowed:
        # Outermost: a browser's preflight has neither key nor body.
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_allowed,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-ID", "X-Trace-ID"],
        )
    return app


def _items(body: Any, settings: GatewaySettings) -> list[Any]:
    if not isinstance(body, dict):
        raise invalid([FieldError("", "must be a JSON object")])
    items, limit = body.get("requests"), settings.max_batch_items
    if set(body) - {"requests"}:
        raise invalid([FieldError("", "unknown field; allowed are: requests")])
    if not isinstance(items, list) or not 1 <= len(items) <= limit:
        raise invalid([FieldError("/requests", f"must be a list of 1 to {limit} questions")])
    return items


class _ResultStream(Response):
    """Sends each result as it comes, and stops the work when the caller goes."""

    def __init__(
        self, results: AsyncGenerator[tuple[int, Outcome]], request_id: str, media_type: str
    ) -> None:
        super().__init__(
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}, media_type=media_type
        )
        del self.headers["content-length"]
        self._results = results
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(GatewayError):
            await unless_gone(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for index, outcome in self._results:
                body = self._line(index, outcome)
                await send({"type": "http.response.body", "body": body, "more_body": True})
            last = b"event: done\ndata: {}\n\n" if self.media_type == SSE else b""
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            await self._results.aclose()

    def _line(self, index: int, outcome: Outcome) -> bytes:
        if isinstance(outcome, QaResponse):
            line = BatchLine(index, response=outcome)
        else:
            line = BatchLine(index, error=problem_of(outcome, f"{self._request_id}.{index}"))
        data = BATCH_LINE.dump_json(line, exclude_none=True)
        if self.media_type == SSE:
            return b"event: result\nid: %d\ndata: %s\n\n" % (index, data)
        return data + b"\n"
