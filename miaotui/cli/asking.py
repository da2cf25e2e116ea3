"""Asks a running gateway one question, over HTTP or gRPC."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from miaotui.cli.demo import Asked
from miaotui.cli.shared import headers_with

DEFAULT_URL = "http://127.0.0.1:8080"
# An explanation takes many forwards and backwards.
_EXPLAIN_SECONDS = 65.0


@dataclass(frozen=True)
class Options:
    """What may be set about an answer; `None` leaves it to the gateway."""

    top_k: int = 1
    max_answer_length: int | None = None
    no_answer_threshold: float | None = None
    no_cache: bool = False
    timeout: float = 30.0
    collection: str | None = None
    """Documents to answer from, instead of the passage."""
    key: str = ""
    explain: bool = False


@dataclass(frozen=True)
class Reply:
    """The answer as the HTTP API gives it, and how long the caller waited for it."""

    body: dict[str, Any]
    milliseconds: float


class AskError(Exception):
    """No answer; the message says what was wrong and what to do."""


def ask_http(url: str, asked: Asked, options: Options) -> Reply:
    """Asks over HTTP; `url` is the gateway's, without a path. Raises `AskError`."""
    import httpx

    body: dict[str, Any] = {
        "question": asked.question,
        "top_k": options.top_k,
        "no_cache": options.no_cache,
    }
    if options.explain:
        body["explain"] = True
    if options.collection is None:
        body["context"] = asked.context
    else:
        body["collection"] = options.collection
    if options.max_answer_length is not None:
        body["max_answer_length"] = options.max_answer_length
    if options.no_answer_threshold is not None:
        body["no_answer_threshold"] = options.no_answer_threshold
    # The gateway is named outright: a proxy of the environment must not come between.
    base = url.rstrip("/")
    headers = headers_with(options.key)
    seconds = max(options.timeout, _EXPLAIN_SECONDS) if options.explain else options.timeout
    with httpx.Client(timeout=seconds, trust_env=False, headers=headers) as client:
        try:
            client.get(f"{base}/healthz")  # opens the connection, which is no part of the answer
            began = time.perf_counter()
            response = client.post(f"{base}/v1/qa", json=body)
            elapsed = (time.perf_counter() - began) * 1000
        except httpx.TimeoutException:
            raise AskError(f"no answer from {url} within {seconds:.0f} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise AskError(unreachable(url, str(error), "--url")) from None
    if response.status_code != 200:
        raise AskError(problem_text(url, response.status_code, response.content))
    return Reply(response.json(), elapsed)


def ask_grpc(target: str, asked: Asked, options: Options) -> Reply:
    """Asks over gRPC; `target` is the gateway's host:port. Raises `AskError`."""
    import grpc

    from miaotui.v1 import gateway_pb2, gateway_pb2_grpc
    from services.rpc.tls import blocking_channel

    request = gateway_pb2.AnswerRequest(
        question=asked.question,
        context=asked.context,
        top_k=options.top_k,
        max_answer_length=options.max_answer_length or 0,
        no_answer_threshold=options.no_answer_threshold,
        no_cache=options.no_cache,
    )
    with blocking_channel(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=min(5.0, options.timeout))
        except grpc.FutureTimeoutError:
            raise AskError(unreachable(target, "nothing answers", "--grpc")) from None
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        began = time.perf_counter()
        try:
            metadata = (("authorization", f"Bearer {options.key}"),) if options.key else ()
            response = stub.Answer(request, timeout=options.timeout, metadata=metadata)
        except grpc.RpcError as error:
            code, details = error.code().name, error.details()
            raise AskError(f"{target} answered {code}: {details}") from None
        elapsed = (time.perf_counter() - began) * 1000
    return Reply(_from_message(response), elapsed)


def _from_message(response: Any) -> dict[str, Any]:
    from miaotui.v1 import gateway_pb2

    cache = gateway_pb2.CacheStatus.Name(response.cache).removeprefix("CACHE_STATUS_").lower()
    candidates = [
        {"text": a.text, "start": a.start, "end": a.end, "score": a.score, "logit": a.logit}
        for a in response.answers
    ]
    return {
        "answerable": response.answerable,
        "answers": candidates,
        "no_answer_score": response.no_answer_score,
        "model": response.model,
        "model_fingerprint": response.model_fingerprint,
        "cache": cache,
        "timings": [{"hop": t.hop, "milliseconds": t.milliseconds} for t in response.timings],
        "trace_id": response.trace_id,
        "request_id": response.request_id,
    }


def unreachable(where: str, why: str, flag: str) -> str:
    """What to tell where nothing answers at `where`, which `flag` sets."""
    return (
        f"cannot reach a gateway at {where} ({why}). Start one with `miaotui up`, "
        f"or say where it is with {flag}."
    )


def problem_text(url: str, status: int, content: bytes) -> str:
    """What to tell of a reply that is no success."""
    import json

    try:
        problem = json.loads(content)
        lines = [f"{problem['title']} ({status}): {problem.get('detail', '')}".strip()]
        lines += [f"  {e.get('pointer') or '/'}: {e['detail']}" for e in problem.get("errors", [])]
    except (ValueError, KeyError, TypeError):
        return f"{url} answered {status}, and not as a Miaotui gateway does; is it one?"
    return "\n".join(lines)
