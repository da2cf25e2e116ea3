"""The gateway's process: HTTP and gRPC in one event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from contextlib import nullcontext

import uvicorn
from opentelemetry.metrics import Observation, get_meter
from starlette.types import ASGIApp

from gateway.access.control import AccessControl
from gateway.access.limiter import Limiter, LocalLimiter
from gateway.access.redis_limiter import RedisLimiter
from gateway.access.store import Keyring
from gateway.cache.backend import CacheBackend, EmbeddedBackend
from gateway.cache.stores import AnswerCache, PromptCache, SealedStore
from gateway.desk import Desk
from gateway.explaining import ExplanationDesk
from gateway.generation.generator import Generator
from gateway.generation.memory import TextCache
from gateway.http.app import build_app
from gateway.http.protocol import bounded_protocol
from gateway.live.api import LiveFigures
from gateway.live.collector import TraceCollector
from gateway.live.sampling import RequestSampler
from gateway.live.traces import RingProcessor, TraceRing
from gateway.media.captioner import Captioner
from gateway.media.transcriber import Transcriber
from gateway.metrics import GatewayMetrics
from gateway.models import GenerativePair, Models
from gateway.pipeline import Pipeline
from gateway.reading import read_spans
from gateway.rpc import COUNTED, SERVICE, GatewayServicer
from gateway.settings import GatewaySettings, split_listen
from gateway.slots import Slots
from miaotui.telemetry import Spans, setup_logging, setup_telemetry
from services.cache.codec import Sealer
from services.cache.redis import RedisBackend
from services.rpc.server import AddressInUseError, RpcServer, run, stop_event
from services.rpc.tls import CERTIFICATE, KEY

log = logging.getLogger(__name__)


def open_backends(
    settings: GatewaySettings, metrics: GatewayMetrics
) -> tuple[CacheBackend, CacheBackend]:
    """The backends of answer and prompt cache; one Redis for both, or memory for each.

    Raises `ValueError` where the Redis URL is not one.
    """
    if settings.redis_url is None:
        ttl = settings.cache_ttl_seconds
        return (
            EmbeddedBackend(settings.answer_cache_bytes, ttl),
            EmbeddedBackend(settings.prompt_cache_bytes, ttl),
        )
    redis = RedisBackend(
        settings.redis_url.get_secret_value(),
        settings.cache_ttl_seconds,
        settings.cache_timeout,
        metrics.cache_failure,
    )
    get_meter("miaotui.gateway").create_observable_gauge(
        "miaotui.gateway.cache.up",
        callbacks=[lambda _: [Observation(int(redis.healthy))]],
        description="1 while Redis is used, 0 while it is avoided because it failed",
    )
    return redis, redis


def open_desk(
    settings: GatewaySettings,
    models: Models,
    backends: tuple[CacheBackend, CacheBackend],
    metrics: GatewayMetrics,
) -> Desk:
    """Where questions arrive, with a worker for each model; `backends`: answers and prompts."""
    encryption = settings.cache_encryption_key
    sealer = Sealer(
        settings.cache_secret.get_secret_value(),
        None if encryption is None else encryption.get_secret_value(),
    )

    def store(name: str, backend: CacheBackend) -> SealedStore:
        return SealedStore(name, backend, sealer, metrics, settings.cache_value_bytes)

    pipeline = explaining = None
    if models.extractive is not None:
        pipeline = Pipeline(
            settings,
            models.extractive,
            AnswerCache(store("answer", backends[0])),
            PromptCache(store("prompt", backends[1])),
            read_spans,
            metrics,
        )
        explaining = ExplanationDesk(pipeline, models.extractive)
    texts = TextCache(store("text", backends[0]))

    def writer(pair: GenerativePair | None) -> Generator | None:
        return None if pair is None else Generator(settings, pair, texts, metrics)

    files = Slots(settings.max_media_requests)
    hears, sees = writer(models.transcribing), writer(models.captioning)
    return Desk(
        settings,
        pipeline,
        writer(models.generative),
        explaining,
        models.encoder,
        metrics,
        None if hears is None else Transcriber(hears, files),
        None if sees is None else Captioner(sees, files),
    )


def open_access(
    settings: GatewaySettings, backend: CacheBackend, metrics: GatewayMetrics
) -> AccessControl | None:
    """Who may come in; `None`: everybody. Limits are counted in `backend` where it is Redis.

    Raises `KeyFileError`.
    """
    if settings.keys is None:
        return None
    limiter: Limiter = LocalLimiter()
    if isinstance(backend, RedisBackend):
        longest = max(settings.max_request_timeout, settings.max_generation_timeout)
        limiter = RedisLimiter(backend, 1.5 * longest)
    return AccessControl(Keyring(settings.keys.expanduser()), limiter, metrics)


def _bind(listen: str) -> socket.socket:
    host, port = split_listen(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise AddressInUseError(
            f"cannot listen on {listen} ({error.strerror}); choose another address with "
            "MIAOTUI_GATEWAY_HTTP_LISTEN, or stop the process that holds it"
        ) from None


def _http_server(app: ASGIApp, settings: GatewaySettings) -> uvicorn.Server:
    tls = settings.tls_dir if settings.https else None
    config = uvicorn.Config(
        app,
        loop="none",
        http=bounded_protocol(settings),
        ws="none",
        lifespan="off",
        # The access log would hold paths, which are the caller's text.
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
        ssl_certfile=tls / CERTIFICATE if tls else None,
        ssl_keyfile=tls / KEY if tls else None,
    )
    server = uvicorn.Server(config)
    # One handler of ours stops both servers.
    server.capture_signals = nullcontext
    return server


async def serve_gateway(settings: GatewaySettings, traces: TraceRing) -> None:
    """Serves until SIGINT or SIGTERM, then finishes running requests.

    `traces`: what telemetry feeds with the gateway's own spans.

    Raises `AddressInUseError` where a listen address cannot be bound, `ValueError` for a
    setting that is not valid. Telemetry and logging are the caller's to set up.
    """
    metrics = GatewayMetrics(traces)
    backends = open_backends(settings, metrics)
    access = open_access(settings, backends[0], metrics)
    models = Models(settings)
    desk = open_desk(settings, models, backends, metrics)
    rpc = RpcServer(SERVICE)
    servicer = GatewayServicer(settings, models, desk, access)
    servicer.add_to(rpc.aio)
    # Whoever may not ask without a key may not tell of requests, unless it is known to be ours.
    known = access is None or (settings.tls_dir is not None and settings.tls_mutual)
    TraceCollector(traces, from_anywhere=known).add_to(rpc.aio)
    rpc.tracing.count(metrics.live, *(f"/{SERVICE}/{name}" for name in COUNTED))
    live = LiveFigures(settings, models, metrics.live, traces)
    http = _http_server(build_app(settings, models, desk, metrics, live, access), settings)
    stopping = stop_event()
    try:
        listener = _bind(settings.http_listen)
        await rpc.start(settings.grpc_listen)
        models.start()
        live.start()
        desk.documents.start()
        await rpc.set_serving(True)
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        host, port = listener.getsockname()[:2]
        scheme = "https" if settings.https else "http"
        log.info("HTTP on %s://%s:%d, gRPC on port %d", scheme, host, port, rpc.port)
        await stopping.wait()
        log.info("stopping: finishing running requests for up to %g s", settings.drain_seconds)
        http.should_exit = True
        await asyncio.gather(serving, rpc.stop(settings.drain_seconds))
    finally:
        await desk.close()
        await live.close()
        await models.close()
        if access is not None:
            await access.close()
        for backend in {id(backend): backend for backend in backends}.values():
            await backend.close()


def main(settings: GatewaySettings) -> int:
    """Runs the gateway until it is told to stop; returns the process's exit code."""
    setup_logging("gateway", settings.log_level)
    traces = TraceRing(settings.kept_traces)
    spans = Spans(RingProcessor(traces), sampler=RequestSampler(settings.traces_per_second))
    telemetry = setup_telemetry("miaotui-gateway", spans=spans if settings.kept_traces else None)
    try:
        return run(lambda: serve_gateway(settings, traces))
    finally:
        telemetry.shutdown()
