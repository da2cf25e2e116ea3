"""The bundled encoder's stage as a process, and vectors of it by the gateway's own way."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from gateway.documents.encoding import StageEncoder
from gateway.models import EncoderPair
from gateway.settings import GatewaySettings
from miaotui.retrieval.encoder import BUNDLED_NAME, Vectors, bundled_folder
from tests.processes import START_SECONDS, ServiceProcess, free_port


class EncoderStage(ServiceProcess):
    """One stage that holds all of the encoder; it takes a second or two to serve."""

    def __init__(self, directory: Path) -> None:
        """`directory`: for its log."""
        self.address = f"127.0.0.1:{free_port()}"
        env = {
            "MIAOTUI_SHARD_TASK": "embed",
            "MIAOTUI_SHARD_MODEL": str(bundled_folder()),
            "MIAOTUI_SHARD_STAGES": self.address,
            "MIAOTUI_SHARD_DTYPE": "float32",
        }
        argv = [sys.executable, "-m", "services.shard"]
        super().__init__("encoder", argv, env, directory / "encoder.log")


class StageVectors:
    """A stage's vectors for code that waits: the gateway's way, on a loop of its own."""

    name = BUNDLED_NAME

    def __init__(self, address: str) -> None:
        """Returns when the stage at `address` (host:port) serves."""
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        opening = asyncio.run_coroutine_threadsafe(open_encoder(address), self._loop)
        self._pair, self._encoder = opening.result()

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors [texts, dimensions]; one alone goes as a question, several as passages."""
        if len(texts) == 1:
            row = asyncio.run_coroutine_threadsafe(self._question(texts[0]), self._loop).result()
            assert row is not None, "the stage gave no vector"
            return row[None]
        work = self._encoder.passages(texts)
        vectors = asyncio.run_coroutine_threadsafe(work, self._loop).result()
        assert vectors is not None, "the stage gave no vectors"
        return vectors

    async def _question(self, text: str) -> Vectors | None:
        asked = self._encoder.question(text)
        return None if asked is None else await asyncio.wrap_future(asked)

    def close(self) -> None:
        """Ends the links."""
        asyncio.run_coroutine_threadsafe(self._pair.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)


async def open_encoder(address: str) -> tuple[EncoderPair, StageEncoder]:
    """The gateway's side of a stage, once that serves; the first is to be closed."""
    pair = EncoderPair(GatewaySettings(encoder_stages=address))
    pair.start()
    async with asyncio.timeout(START_SECONDS):
        await pair.serving.wait()
    return pair, StageEncoder(pair)
