"""A picture to what a model writes about it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

from gateway.calling import time_left
from gateway.errors import GatewayError
from gateway.generation.generator import Generator
from gateway.generation.request import GenerationRequest
from gateway.media.reading import media_of, read_file
from gateway.served import Served
from gateway.slots import Slots
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb


class Captioner:
    """Turns requests with a picture into ones that its `generator` takes."""

    def __init__(self, generator: Generator, slots: Slots) -> None:
        """`slots`: pictures read at once."""
        self.generator = generator
        self._slots = slots

    async def about(
        self,
        request: GenerationRequest,
        picture: bytes,
        served: Served,
        request_id: str,
        deadline: float,
        place: str,
    ) -> GenerationRequest:
        """`request` with the picture in its prompt's place; nothing of the prompt is read.

        `deadline` on the event loop's clock; `place`: a JSON pointer to the picture, for errors.
        Raises `GatewayError`.
        """
        with self._slots.one(self.generator.refused):
            windows = read_file(self.generator.pair, served, picture, request_id, deadline, place)
            try:
                async with asyncio.timeout(time_left(deadline)), aclosing(windows):
                    async for window in windows:
                        return replace(
                            request,
                            prompt=tokenizer_pb.MediaPrompt(),
                            features=window.features,
                            max_tokens=request.max_tokens or media_of(served).advised_tokens,
                        )
            except TimeoutError:
                raise GatewayError("timeout", "The request's time ran out.") from None
        raise GatewayError("service-failed", "The tokenizer made nothing of the picture.")
