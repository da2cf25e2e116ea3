"""A model directory's own feature extractor: sound or pictures to its encoder's input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from miaotui.media.budget import Budget
from miaotui.media.errors import MediaError
from miaotui.text.errors import ModelDirectoryError

Modality = Literal["audio", "image"]


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """What one file may cost: its bytes, a sound's seconds, a picture's pixels.

    Pictures that are read at once have no more pixels together, either: the others wait.
    """

    max_bytes: int = 32 * 1024 * 1024
    max_seconds: float = 4 * 3600.0
    max_pixels: int = 40_000_000


@dataclass(frozen=True, slots=True)
class Features:
    """What one encoder run takes: float32 [mel bins, frames] of a window of sound, or
    [channels, height, width] of a picture; the window's place in the sound, in seconds."""

    values: NDArray[np.float32]
    start_seconds: float = 0.0
    end_seconds: float = 0.0


class FeatureExtractor:
    """Runs one model's extractor. Thread-safe."""

    def __init__(self, modality: Modality, extractor: Any, limits: MediaLimits) -> None:
        """`extractor`: a feature extractor or image processor of transformers'."""
        self.modality = modality
        self.limits = limits
        self._extractor = extractor
        self._pixels = Budget(limits.max_pixels)

    @property
    def window_seconds(self) -> float:
        """How much sound an encoder run takes; 0: it takes pictures."""
        return float(self._extractor.chunk_length) if self.modality == "audio" else 0.0

    def extract(self, data: bytes) -> Iterator[Features]:
        """The features of a file: a window of sound after the other, or of a picture.

        Raises `MediaError`.
        """
        if not data:
            raise MediaError("file", "is empty")
        if len(data) > self.limits.max_bytes:
            raise MediaError("file", f"has more than {self.limits.max_bytes} bytes")
        return self._heard(data) if self.modality == "audio" else self._seen(data)

    def _heard(self, data: bytes) -> Iterator[Features]:
        from miaotui.media.audio import read_windows

        rate = int(self._extractor.sampling_rate)
        limit = self.limits.max_seconds
        for window in read_windows(data, rate, self.window_seconds, max_seconds=limit):
            made = self._extractor(window.samples, sampling_rate=rate, return_tensors="np")
            values = np.ascontiguousarray(made["input_features"][0], np.float32)
            yield Features(values, window.start_seconds, window.end_seconds)

    def _seen(self, data: bytes) -> Iterator[Features]:
        from miaotui.media.images import claimed_pixels, read_picture

        most = self.limits.max_pixels
        # A pixel takes some twenty bytes on the way: a file of some kilobytes up to a gigabyte.
        with self._pixels.taking(claimed_pixels(data, max_pixels=most)):
            picture = read_picture(data, max_pixels=most)
            try:
                made = self._extractor(picture, return_tensors="np")
            except ValueError:  # such as a picture of one pixel, whose channels cannot be told
                raise MediaError(
                    "file", "is a picture that the model's processor refuses"
                ) from None
        yield Features(np.ascontiguousarray(made["pixel_values"][0], np.float32))


def modality_of(config: Mapping[str, Any]) -> Modality | None:
    """What a model of this `config.json` listens to or looks at; None: it reads text only."""
    kind = config.get("model_type")
    if kind == "whisper":
        return "audio"
    return "image" if kind == "vision-encoder-decoder" else None


def load_extractor(
    model_dir: Path, modality: Modality, *, limits: MediaLimits | None = None
) -> FeatureExtractor:
    """The extractor that the directory's preprocessor_config.json describes.

    Never goes to the network, runs no code of the checkpoint's, and needs no torchvision.
    Raises `ModelDirectoryError`.
    """
    _check_libraries(modality)
    try:
        if modality == "audio":
            from transformers import WhisperFeatureExtractor

            extractor: Any = WhisperFeatureExtractor.from_pretrained(
                model_dir, local_files_only=True
            )
        else:
            from transformers import AutoImageProcessor

            extractor = AutoImageProcessor.from_pretrained(
                model_dir, backend="pil", local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever a damaged file makes transformers raise
        raise ModelDirectoryError(
            f"{model_dir}: its preprocessor_config.json cannot be used ({type(error).__name__}: "
            f"{error}); copy it from the model's page again"
        ) from error
    return FeatureExtractor(modality, extractor, limits or MediaLimits())


def _check_libraries(modality: Modality) -> None:
    """Imports what decodes files, which other models do not need."""
    try:
        if modality == "audio":
            import miaotui.media.audio
        else:
            import miaotui.media.images  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a library of the system's is missing
        libraries = "soundfile and soxr" if modality == "audio" else "pillow"
        raise ModelDirectoryError(
            f"the libraries that read {'sound' if modality == 'audio' else 'pictures'} cannot be "
            f"loaded ({error}); install {libraries}"
        ) from error
