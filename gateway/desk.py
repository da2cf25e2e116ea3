"""Where questions arrive: each goes to the model that its mode calls for."""

from __future__ import annotations

import time
from dataclasses import replace

from gateway.documents.answering import CollectionAnswerer
from gateway.documents.service import Documents
from gateway.explaining import ExplanationDesk
from gateway.generation.answering import Answerer
from gateway.generation.generator import Generator
from gateway.media.captioner import Captioner
from gateway.media.transcriber import Transcriber
from gateway.metrics import GatewayMetrics
from gateway.models import EncoderPair
from gateway.pipeline import Pipeline
from gateway.schema import QaRequest, QaResponse, no_model_for
from gateway.settings import GatewaySettings


class Desk:
    """Answers questions in either mode; `pipeline` or `generator` may be missing.

    `explaining` is there where `pipeline` is. `encoder`: see `Documents`. `transcriber` and
    `captioner` have other doors than questions, and are kept and closed here.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        pipeline: Pipeline | None,
        generator: Generator | None,
        explaining: ExplanationDesk | None = None,
        encoder: EncoderPair | None = None,
        metrics: GatewayMetrics | None = None,
        transcriber: Transcriber | None = None,
        captioner: Captioner | None = None,
    ) -> None:
        self._settings = settings
        self._explaining = explaining
        self._pipeline = pipeline
        self.generator = generator
        self.transcriber = transcriber
        self.captioner = captioner
        self._answerer = None if generator is None else Answerer(generator)
        self.documents = Documents(settings, encoder, metrics)
        self.collections = CollectionAnswerer(
            settings, self.documents, pipeline, self._answerer, explaining
        )

    async def answer(
        self, request: QaRequest, request_id: str, timeout: float | None
    ) -> QaResponse:
        """Answers within `timeout` seconds; None: the mode's default. Raises `GatewayError`."""
        if request.mode == "generative":
            if self._answerer is None:
                raise no_model_for("generative")
            seconds = self._settings.generation_timeout if timeout is None else timeout
            return await self._answerer.answer(request, request_id, seconds)
        if self._pipeline is None:
            raise no_model_for("extractive")
        longest = self._settings.max_request_timeout
        usual = longest if request.explain else self._settings.request_timeout
        seconds = usual if timeout is None else min(timeout, longest)
        if not request.explain:
            return await self._pipeline.answer(request, request_id, seconds)
        began = time.monotonic()
        answer = await self._pipeline.answer(request, request_id, seconds)
        assert self._explaining is not None, "there is a pipeline"
        explanation = await self._explaining.explain(
            request,
            request_id,
            max(0.001, seconds - (time.monotonic() - began)),
            cache=answer.cache,
            timings=answer.timings,
            answerable=answer.answerable,
        )
        return replace(answer, explanation=explanation)

    async def close(self) -> None:
        """Waits for cache writes that are under way, and ends work on documents."""
        await self.documents.close()
        media = (self.transcriber, self.captioner)
        writers = (None if one is None else one.generator for one in media)
        for worker in (self._pipeline, self.generator, *writers):
            if worker is not None:
                await worker.close()
