"""Where questions arrive: each goes to the model that its mode calls for."""

from __future__ import annotations

from gateway.documents.answering import CollectionAnswerer
from gateway.documents.service import Documents
from gateway.generation.answering import Answerer
from gateway.generation.generator import Generator
from gateway.pipeline import Pipeline
from gateway.schema import QaRequest, QaResponse, no_model_for
from gateway.settings import GatewaySettings


class Desk:
    """Answers questions in either mode; `pipeline` or `generator` may be missing."""

    def __init__(
        self, settings: GatewaySettings, pipeline: Pipeline | None, generator: Generator | None
    ) -> None:
        self._settings = settings
        self._pipeline = pipeline
        self.generator = generator
        self._answerer = None if generator is None else Answerer(generator)
        self.documents = Documents(settings)
        self.collections = CollectionAnswerer(settings, self.documents, pipeline, self._answerer)

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
        seconds = self._settings.request_timeout if timeout is None else min(timeout, longest)
        return await self._pipeline.answer(request, request_id, seconds)

    async def close(self) -> None:
        """Waits for cache writes that are under way, and ends work on documents."""
        await self.documents.close()
        for worker in (self._pipeline, self.generator):
            if worker is not None:
                await worker.close()
