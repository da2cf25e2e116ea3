"""Questions over a passage, answered in a sentence that says what it rests on."""

from __future__ import annotations

import asyncio
import time

from gateway.generation.generator import Generator
from gateway.generation.prompts import filled, question_prompt
from gateway.generation.request import GenerationRequest, Prompt, Sampling
from gateway.schema import Citation, Hop, QaRequest, QaResponse
from gateway.served import Served
from miaotui.telemetry import current_trace_id
from miaotui.text.citations import cite, split_passages
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb

DEFAULT_ANSWER_TOKENS = 256
# From here on, cutting and comparing take long enough to leave the event loop for them.
_LONG_CONTEXT = 20_000


class Answerer:
    """Asks the decoder, and finds the answer's sources."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def served(self, timeout: float) -> Served:
        """As `Generator.served`."""
        return await self._generator.served(timeout)

    async def answer(self, request: QaRequest, request_id: str, timeout: float) -> QaResponse:
        """Answers within `timeout` seconds. Raises `GatewayError`; cancelling frees the work."""
        started = time.perf_counter()
        served = await self.served(timeout)
        context = request.context
        long = len(context) >= _LONG_CONTEXT
        cut = asyncio.to_thread(split_passages, context) if long else None
        passages = await cut if cut is not None else split_passages(context)
        wanted = question_prompt(request.question)
        text = filled(wanted, request.question, [context[begin:end] for begin, end in passages])
        prompt: Prompt = text + wanted.lead
        writing = served.writing
        if writing is not None and writing.has_chat_template:
            message = tokenizer_pb.ChatMessage(role="user", content=text)
            prompt = tokenizer_pb.ChatPrompt(
                messages=[message],
                # Models that think first would spend the answer's tokens on it.
                variables_json='{"enable_thinking":false}',
            )
        given = "max_answer_length" in request.model_fields_set
        generation = GenerationRequest(
            prompt=prompt,
            sampling=Sampling(temperature=0.0),
            max_tokens=request.max_answer_length if given else DEFAULT_ANSWER_TOKENS,
            no_cache=request.no_cache,
        )
        left = max(0.001, timeout - (time.perf_counter() - started))
        before = time.perf_counter()
        news, cache = await self._generator.complete(generation, request_id, left)
        generated = time.perf_counter()
        written = "".join(part.text for one in news for part in one.texts).strip()
        if long:
            plain, ranges = await asyncio.to_thread(cite, written, context, passages)
        else:
            plain, ranges = cite(written, context, passages)
        answerable = bool(plain) and wanted.nothing.casefold() not in plain.casefold()
        done = time.perf_counter()
        return QaResponse(
            answerable=answerable,
            answers=[],
            no_answer_score=0.0,
            model=served.name,
            model_fingerprint=served.fingerprint,
            cache=cache,
            timings=[
                Hop("generate", round((generated - before) * 1000, 3)),
                Hop("cite", round((done - generated) * 1000, 3)),
                Hop("total", round((done - started) * 1000, 3)),
            ],
            trace_id=current_trace_id(),
            request_id=request_id,
            answer=plain,
            citations=[
                Citation(begin, end, context[begin:end])
                for begin, end in (ranges if answerable else [])
            ],
        )
