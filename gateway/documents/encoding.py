"""The sentence encoder on threads of its own, loaded when there is something to encode."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from miaotui.retrieval.encoder import BUNDLED_NAME, Encoder, EncoderError, Vectors

log = logging.getLogger(__name__)


class LazyEncoder:
    """Questions and passages on different threads, so that no question waits for a batch.

    Where there is no encoder, that is logged once, and retrieval is lexical.
    """

    name = BUNDLED_NAME

    def __init__(self) -> None:
        self._questions = ThreadPoolExecutor(1, "encode-questions")
        self._passages = ThreadPoolExecutor(1, "encode-passages")
        self._loading: asyncio.Future[Encoder | None] | None = None

    def start(self) -> asyncio.Future[Encoder | None]:
        """Loads the encoder, once; later calls give the same future."""
        if self._loading is None:
            loop = asyncio.get_running_loop()
            self._loading = loop.run_in_executor(self._passages, _load)
        return self._loading

    @property
    def ready(self) -> bool:
        """Whether it has been loaded."""
        loading = self._loading
        return loading is not None and loading.done() and loading.result() is not None

    def question(self, text: str) -> Future[Vectors] | None:
        """A question's vector [1, dimensions], to come; `None` while there is no encoder."""
        if not self.ready:
            self.start()
            return None
        assert self._loading is not None
        encoder = self._loading.result()
        assert encoder is not None
        return self._questions.submit(encoder.encode, [text])

    async def passages(self, texts: Sequence[str]) -> Vectors | None:
        """Passages' vectors [texts, dimensions]; `None` where there is no encoder."""
        encoder = await self.start()
        if encoder is None:
            return None
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._passages, encoder.encode, list(texts))

    def close(self) -> None:
        """Ends the threads when their current batch is done."""
        for threads in (self._questions, self._passages):
            threads.shutdown(wait=False, cancel_futures=True)


def _load() -> Encoder | None:
    from miaotui.retrieval.encoder import SentenceEncoder, bundled_folder

    try:
        return SentenceEncoder(bundled_folder())
    except EncoderError as error:
        log.warning("documents are found by their words only: %s", error)
        return None
