"""Explains an answer: reads its passage once more, has its window explained, and puts it in words.

The stages compute (`services.shard.explain`); nothing but token ids goes there from here, and
nothing but numbers by token comes back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np
from grpc import aio
from numpy.typing import NDArray

from gateway.calling import MARGIN_SECONDS, call_id, retried, time_left
from gateway.decision_path import answer_path, explain_path
from gateway.errors import FieldError, GatewayError
from gateway.explanation import (
    NOTE_ROUGH,
    NOTE_UNANSWERABLE,
    NOTES,
    AttentionView,
    Completeness,
    ExplainedAnswer,
    ExplainedToken,
    ExplainedWord,
    Explanation,
    Part,
    RunnerUp,
    Step,
)
from gateway.models import ExtractivePair
from gateway.pipeline import Clock, Looked, Pipeline
from gateway.reading import places, text_tokens, window_logits
from gateway.schema import CacheStatus, Hop, QaRequest, invalid
from miaotui.engine.spans import Reading, WindowLogits, read_spans
from miaotui.explain.words import TokenValue, sum_by_word
from miaotui.v1 import explain_pb2 as pb
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb
from services.rpc.channel import call

_METHOD = "miaotui.v1.ExplainService/Explain"
_RUNNERS_UP = 5
# Spans beside those that are shown, in place of any that stand for the same characters.
_SPARE_SPANS = 6
# Kept for the answer's own way back when the integral is refined until time runs out.
_RESERVE_SECONDS = 0.5
# The gap above which the sum is called rough, as the integral's own tolerance is finer.
_RELATIVE_GAP, _ABSOLUTE_GAP = 0.01, 0.05


@dataclass(frozen=True, slots=True)
class _Found:
    """The answer's place: characters, and tokens of the window that gives it its logit."""

    start: int
    end: int
    logit: float
    window: int
    first: int
    last: int
    others: list[tuple[int, int, float]]
    reading: Reading
    window_logits: list[float]


class ExplanationDesk:
    """Explains answers to questions over passages."""

    def __init__(self, pipeline: Pipeline, pair: ExtractivePair) -> None:
        self._pipeline = pipeline
        self._pair = pair

    async def explain(
        self,
        request: QaRequest,
        request_id: str,
        timeout: float,
        *,
        cache: CacheStatus,
        timings: Sequence[Hop],
        answerable: bool,
    ) -> Explanation:
        """Explains the best span of `request.context`, within `timeout` seconds.

        `cache`, `timings` and `answerable` are of the answer that it was given before. Raises
        `GatewayError`; cancelling frees the work.
        """
        clock = Clock()
        deadline = asyncio.get_running_loop().time() + timeout
        try:
            async with asyncio.timeout(timeout):
                looked = await self._pipeline.look_closely(request, request_id, deadline, clock)
                began = time.perf_counter()
                found = await asyncio.to_thread(_find, looked, request)
                clock.add("read", time.perf_counter() - began)
                explained = await self._explained(looked, found, request_id, deadline, clock)
        except TimeoutError:
            raise GatewayError("timeout", f"No explanation within {timeout:g} s.") from None
        path = answer_path(cache, timings) + explain_path(
            looked, found.window, found.window_logits, explained, clock
        )
        return await asyncio.to_thread(
            _described, request, looked, found, explained, path, answerable
        )

    async def _explained(
        self, looked: Looked, found: _Found, request_id: str, deadline: float, clock: Clock
    ) -> pb.ExplainResponse:
        window = looked.windows.windows[found.window]
        tokens = len(window.input_ids) // 4
        replaced = np.zeros(tokens, np.uint8)
        layout = looked.windows.layout
        asked = layout.question_position
        replaced[asked : asked + len(layout.question.input_ids) // 4] = 1
        here = window.passage_position
        replaced[here : here + window.passage_tokens] = 1
        sent = pb.ExplainRequest(
            model_fingerprint=looked.served.fingerprint,
            input_ids=window.input_ids,
            token_type_ids=window.token_type_ids,
            replaced=replaced.tobytes(),
            first=found.first,
            last=found.last,
        )

        async def attempt() -> pb.ExplainResponse:
            sent.request_id = call_id(request_id)
            left = time_left(deadline)
            try:
                return await call(
                    self._pair.explain(looked.served),
                    sent,
                    name=_METHOD,
                    timeout=max(left / 2, left - _RESERVE_SECONDS),
                )
            except aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    raise GatewayError("unavailable", "The model has just been replaced.") from None
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    why = f"this model's answers cannot be explained: {error.details()}"
                    raise invalid([FieldError("/explain", why)]) from None
                raise

        return await clock.timed(
            "explain",
            retried(
                attempt,
                "stage 0",
                lambda: self._pair.check_still(looked.served, time_left(deadline) - MARGIN_SECONDS),
                self._pair.budget,
            ),
        )


def _find(looked: Looked, request: QaRequest) -> _Found:
    """The best span, the window that gives it its logit, and the spans after it."""
    windows = window_logits(looked.windows, looked.logits)
    length = request.max_answer_length
    reading = read_spans(windows, top_k=1 + _RUNNERS_UP + _SPARE_SPANS, max_answer_length=length)
    found = places(text_tokens(looked.passage), reading.spans)
    if not found:
        raise GatewayError("service-failed", "No span of the passage stands for any characters.")
    (start, end), best = next(iter(found.items()))
    span = reading.spans[best]
    holders = [
        (_logit(window, span.first, span.last), index)
        for index, window in enumerate(windows)
        if window.passage_first <= span.first
        and span.last < window.passage_first + window.passage_tokens
    ]
    logit, index = max(holders)
    shift = windows[index].passage_position - windows[index].passage_first
    return _Found(
        start=start,
        end=end,
        logit=logit,
        window=index,
        first=span.first + shift,
        last=span.last + shift,
        others=[
            (place[0], place[1], reading.spans[other].logit)
            for place, other in list(found.items())[1 : 1 + _RUNNERS_UP]
        ],
        reading=reading,
        window_logits=[
            read_spans([window], max_answer_length=length).spans[0].logit for window in windows
        ],
    )


def _logit(window: WindowLogits, first: int, last: int) -> float:
    shift = window.passage_position - window.passage_first
    return float(window.start[first + shift]) + float(window.end[last + shift])


def _described(
    request: QaRequest,
    looked: Looked,
    found: _Found,
    explained: pb.ExplainResponse,
    path: list[Step],
    answerable: bool,
) -> Explanation:
    window = looked.windows.windows[found.window]
    count = len(window.input_ids) // 4
    attribution = np.frombuffer(explained.attribution, "<f4").astype(np.float64)
    rollout = np.frombuffer(explained.rollout, "<f4").astype(np.float64)
    shape = (explained.layers, explained.heads, count)
    rows = np.frombuffer(explained.attention, "<f4")
    if not len(attribution) == len(rollout) == count or rows.size != np.prod(shape):
        raise GatewayError("service-failed", "The explanation is not of the window asked about.")
    tokens = _tokens(request, looked, window, attribution, rollout)
    total = float(attribution.sum())
    expected = explained.logit - explained.baseline_logit
    notes = list(NOTES)
    if not answerable:
        notes.insert(0, NOTE_UNANSWERABLE)
    if abs(total - expected) > max(_ABSOLUTE_GAP, _RELATIVE_GAP * abs(expected)):
        notes.insert(0, NOTE_ROUGH)
    runners_up = [
        RunnerUp(request.context[start:end], start, end, logit, found.logit - logit)
        for start, end, logit in found.others
    ]
    attention: AttentionView = {
        "layers": explained.layers,
        "heads": explained.heads,
        "from": [found.first, found.last],
        "rows": np.round(rows.astype(np.float64), 6).reshape(shape).tolist(),
    }
    return Explanation(
        answer=ExplainedAnswer(
            request.context[found.start : found.end], found.start, found.end, explained.logit
        ),
        words=_words(request, tokens),
        tokens=tokens,
        method="integrated_gradients",
        steps=explained.points,
        completeness=Completeness(
            explained.logit, explained.baseline_logit, total, total - expected
        ),
        attention=attention,
        runners_up=runners_up,
        margin=runners_up[0].margin if runners_up else 0.0,
        path=path,
        notes=notes,
    )


def _tokens(
    request: QaRequest,
    looked: Looked,
    window: tokenizer_pb.Window,
    attribution: NDArray[np.float64],
    rollout: NDArray[np.float64],
) -> list[ExplainedToken]:
    layout = looked.windows.layout
    question, passage = text_tokens(layout.question), text_tokens(looked.passage)
    asked, here = layout.question_position, window.passage_position
    ids = np.frombuffer(window.input_ids, "<i4").tolist()
    tokens = []
    for index, token in enumerate(ids):
        part: Part = "special"
        text, start, end = layout.special_tokens.get(token, ""), None, None
        if asked <= index < asked + len(question):
            part, source, tokenized, place = "question", request.question, question, index - asked
        elif here <= index < here + window.passage_tokens:
            part, source, tokenized = "context", request.context, passage
            place = index - here + window.passage_first
        if part != "special":
            start, end = int(tokenized.starts[place]), int(tokenized.ends[place])
            text = source[start:end]
        value, share = float(attribution[index]), float(rollout[index])
        tokens.append(ExplainedToken(text, part, start, end, value, share))
    return tokens


def _words(request: QaRequest, tokens: Sequence[ExplainedToken]) -> list[ExplainedWord]:
    words = []
    for part, text in (("question", request.question), ("context", request.context)):
        own = [
            TokenValue(token.start, token.end, token.attribution)
            for token in tokens
            if token.part == part and token.start is not None and token.end is not None
        ]
        words += [
            ExplainedWord(
                text[word.start : word.end],
                word.start,
                word.end,
                "question" if part == "question" else "context",
                word.value,
            )
            for word in sum_by_word(text, own)
        ]
    return words
