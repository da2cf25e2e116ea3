"""The two caches of the gateway: answers, and tokenised passages ("prompts")."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import msgspec
from google.protobuf.message import DecodeError
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind

from gateway.access.caller import current_tenant
from gateway.cache.backend import CacheBackend
from gateway.explanation import WarningView
from gateway.metrics import GatewayMetrics
from gateway.schema import QaRequest
from miaotui.telemetry import span_within
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb
from services.cache.codec import Sealer

_tracer = trace.get_tracer("miaotui.gateway")


@dataclass(frozen=True, slots=True)
class StoredSpan:
    """An answer without its text, which is cut from the asker's own passage."""

    start: int
    end: int
    score: float
    logit: float


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """What the answer cache keeps of an answer.

    `unknown`: share of the tokens that the model's vocabulary lacks. `warnings`: about question
    and passage, which are in the key; `None`: nobody has looked for any.
    """

    answerable: bool
    no_answer_score: float
    spans: list[StoredSpan]
    unknown: float = 0.0
    warnings: list[WarningView] | None = None


# pydantic takes three times as long over it.
_DECODER: msgspec.json.Decoder[StoredAnswer] = msgspec.json.Decoder(StoredAnswer)


class SealedStore:
    """Sealed values in a backend, each operation in a span and counted."""

    def __init__(
        self,
        name: str,
        backend: CacheBackend,
        sealer: Sealer,
        metrics: GatewayMetrics,
        max_value_bytes: int,
    ) -> None:
        """`name`: "answer" or "prompt"; values above `max_value_bytes` are not kept."""
        self.backend = backend
        self._name = name
        self._sealer = sealer
        self._metrics = metrics
        self._max_value_bytes = max_value_bytes
        self._kind = name.encode()
        self._spans = {
            operation: (
                f"{operation} {name} cache",
                {
                    "db.system.name": backend.system,
                    "db.operation.name": operation,
                    "db.namespace": name,
                },
            )
            for operation in ("GET", "SET")
        }

    def key(self, *parts: str | bytes) -> bytes:
        """The key for what the parts, in their order, identify, apart for each tenant.

        Who shares the work of an equal request in flight finds it by this key, too.
        """
        return self._sealer.key(self._kind, current_tenant(), *parts)

    def salt(self) -> bytes:
        """What keeps the current tenant's share of caches elsewhere apart; empty without one."""
        return self._sealer.salt(current_tenant())

    async def read(self, key: bytes) -> bytes | None:
        """The payload under `key`; call `found` once it has been made sense of."""
        with self._span("GET"):
            value = await self.backend.get(key)
        if value is None:
            self._metrics.lookup(self._name, "miss")
            return None
        payload = self._sealer.open(key, value)
        if payload is None:
            self._metrics.lookup(self._name, "garbage")
        return payload

    def found(self, understood: bool) -> None:
        """Counts a payload that was understood, or was not."""
        self._metrics.lookup(self._name, "hit" if understood else "garbage")

    async def write(self, key: bytes, payload: bytes) -> None:
        """Keeps the payload if it is small enough."""
        if len(payload) <= self._max_value_bytes:
            with self._span("SET"):
                await self.backend.put(key, self._sealer.wrap(key, payload))

    def _span(self, operation: str) -> AbstractContextManager[Span]:
        name, attributes = self._spans[operation]
        return span_within(_tracer, name, kind=SpanKind.CLIENT, attributes=attributes)


class AnswerCache:
    """Answers by model, question, passage and parameters."""

    def __init__(self, store: SealedStore) -> None:
        self.store = store

    def key(self, fingerprint: str, request: QaRequest) -> bytes:
        """The key of a request's answer; `fingerprint` is that of model and tokenizer."""
        return self.store.key(
            fingerprint,
            request.question,
            request.context,
            f"{request.top_k} {request.max_answer_length} {request.no_answer_threshold!r}",
            f"{request.normalization} {request.strip_markup}",
        )

    async def get(self, key: bytes, request: QaRequest) -> StoredAnswer | None:
        """The answer kept under `key`, if it fits the request's passage."""
        payload = await self.store.read(key)
        if payload is None:
            return None
        try:
            stored = _DECODER.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.store.found(False)
            return None
        end = len(request.context)
        fits = all(0 <= span.start <= span.end <= end for span in stored.spans)
        self.store.found(fits)
        return stored if fits else None

    async def put(self, key: bytes, stored: StoredAnswer) -> None:
        """Keeps an answer."""
        await self.store.write(key, msgspec.json.encode(stored))


class PromptCache:
    """Tokenised passages by tokenizer, passage and cleaning. Long ones save the most."""

    def __init__(self, store: SealedStore) -> None:
        self.store = store

    def key(self, fingerprint: str, request: QaRequest) -> bytes:
        """The key of a passage; `fingerprint` is that of the tokenizer."""
        options = f"{request.normalization} {request.strip_markup}"
        return self.store.key(fingerprint, request.context, options)

    async def get(self, key: bytes, request: QaRequest) -> tokenizer_pb.TokenizedText | None:
        """The tokenised passage kept under `key`."""
        payload = await self.store.read(key)
        if payload is None:
            return None
        try:
            text = tokenizer_pb.TokenizedText.FromString(payload)
        except DecodeError:
            self.store.found(False)
            return None
        sizes = {len(text.input_ids), len(text.starts), len(text.ends)}
        fits = len(sizes) == 1 and text.characters == len(request.context)
        self.store.found(fits)
        return text if fits else None

    async def put(self, key: bytes, text: tokenizer_pb.TokenizedText) -> None:
        """Keeps a tokenised passage."""
        await self.store.write(key, text.SerializeToString())
