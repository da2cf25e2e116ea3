"""Files to features on threads of their own, so that text does not wait for sound."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor

from miaotui.media.features import FeatureExtractor, Features
from miaotui.media.tokenizer import MediaTokenizer
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tensor_pb2 as tensor_pb
from miaotui.v1 import tokenizer_pb2 as pb
from services.tokenizer.quiet import native_silence
from services.tokenizer.workers import BusyError

_MODALITIES = {
    "audio": shard_pb.INPUT_MODALITY_AUDIO,
    "image": shard_pb.INPUT_MODALITY_IMAGE,
}


class MediaReader:
    """Reads files, a window at a time: the next one is made when it is asked for."""

    def __init__(self, extractor: FeatureExtractor, threads: int, max_files: int) -> None:
        """`threads` 0: one a core, four at most; `max_files`: open at once, more are refused."""
        self._extractor = extractor
        self._pool = ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 4), "media")
        self._max_files = max_files
        self._open = 0

    async def read(self, data: bytes) -> AsyncGenerator[Features]:
        """The features of a file. Raises `MediaError` and `BusyError`."""
        if self._open >= self._max_files:
            raise BusyError(f"{self._open} files are being read; try again later")
        self._open += 1
        try:
            windows = self._extractor.extract(data)
            loop = asyncio.get_running_loop()
            while (made := await loop.run_in_executor(self._pool, _next, windows)) is not None:
                yield made
        finally:
            self._open -= 1

    def close(self) -> None:
        """Returns when what runs has ended."""
        self._pool.shutdown(cancel_futures=True)


def _next(windows: Iterator[Features]) -> Features | None:
    with native_silence():
        return next(windows, None)


def features_to_proto(features: Features) -> pb.ExtractFeaturesResponse:
    """The features as sent."""
    values = features.values.astype("<f4", copy=False)
    return pb.ExtractFeaturesResponse(
        features=shard_pb.Features(
            header=tensor_pb.TensorHeader(dtype=tensor_pb.DTYPE_FLOAT32, shape=values.shape),
            data=values.tobytes(),
        ),
        start_seconds=features.start_seconds,
        end_seconds=features.end_seconds,
    )


def media_to_proto(tokenizer: MediaTokenizer) -> pb.MediaInput:
    """What the model's encoder takes, as told."""
    extractor = tokenizer.extractor
    return pb.MediaInput(
        modality=_MODALITIES[extractor.modality],
        window_seconds=extractor.window_seconds,
        max_file_bytes=extractor.limits.max_bytes,
        languages=[
            pb.SpokenLanguage(code=one.code, name=one.name, token_id=one.token)
            for one in tokenizer.languages
        ],
        advised_tokens=tokenizer.advised_tokens,
    )
