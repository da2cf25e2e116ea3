"""Sound files to windows of samples, block by block: an hour is never held in memory whole."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from miaotui.media.errors import MediaError

Samples = NDArray[np.float32]

_BLOCK_SECONDS = 5.0
# A window is cut at the quietest place of its last seconds, so that no word is cut in two.
CUT_SECONDS = 5.0
_QUIET_SECONDS = 0.2
_HOP_SECONDS = 0.01
# What is left after the last cut is silence or a click, and models make words up of it.
_SHORTEST_SECONDS = 0.05
_KINDS = "WAV, FLAC, OGG (Vorbis, Opus) and MP3"
# Samples a second that a file may claim: a header can say anything.
_MAX_RATE = 384_000
_MAX_CHANNELS = 32


@dataclass(frozen=True, slots=True)
class SoundWindow:
    """A stretch of sound; `samples` float32 [samples] between -1 and 1, mono."""

    samples: Samples
    start_seconds: float
    end_seconds: float


def read_windows(
    data: bytes, rate: int, window_seconds: float, *, max_seconds: float
) -> Iterator[SoundWindow]:
    """The windows of a sound file, in order, at `rate` samples a second.

    A file of at most `window_seconds` is one window. A longer one is cut into windows of at
    most that, each at the quietest place (least energy over 0.2 s) of its last 5 s. Raises
    `MediaError` where the file is broken, of an unknown kind, or longer than `max_seconds`.
    """
    longest = round(window_seconds * rate)
    held = np.zeros(0, np.float32)
    first = 0
    for block in _resampled(data, rate, max_seconds):
        held = np.concatenate((held, block))
        while len(held) > longest:
            cut = _quietest(held[:longest], rate)
            yield _window(held[:cut], first, rate)
            held, first = held[cut:], first + cut
    if not first and not len(held):
        raise MediaError("file", "holds no sound; send a recording that is not empty")
    if not first or len(held) >= _SHORTEST_SECONDS * rate:
        yield _window(held, first, rate)


def _window(samples: Samples, first: int, rate: int) -> SoundWindow:
    return SoundWindow(samples, first / rate, (first + len(samples)) / rate)


def _quietest(samples: Samples, rate: int) -> int:
    """Where to cut, in samples: within the last `CUT_SECONDS`."""
    tail = samples[-min(len(samples) // 2, round(CUT_SECONDS * rate)) :]
    hop = max(1, round(_HOP_SECONDS * rate))
    energy = np.square(tail[: len(tail) // hop * hop].reshape(-1, hop)).sum(axis=1)
    span = min(len(energy), round(_QUIET_SECONDS / _HOP_SECONDS))
    if not span:
        return len(samples)
    sums = np.convolve(energy, np.ones(span), "valid")
    # The last of equally quiet places: windows as long as can be.
    best = len(sums) - 1 - int(np.argmin(sums[::-1]))
    return len(samples) - len(tail) + (best + span // 2) * hop


def _resampled(data: bytes, rate: int, max_seconds: float) -> Iterator[Samples]:
    with _open(data) as file:
        _check_header(file, max_seconds)
        resampler = None
        if file.samplerate != rate:
            resampler = soxr.ResampleStream(file.samplerate, rate, 1, dtype="float32", quality="HQ")
        frames = 0
        while True:
            block = _read(file, round(_BLOCK_SECONDS * file.samplerate))
            frames += len(block)
            if frames > max_seconds * file.samplerate:
                raise _too_long(max_seconds)
            mono = block.mean(axis=1, dtype=np.float32)
            last = not len(block)
            if resampler is not None:
                mono = resampler.resample_chunk(mono, last=last)
            if len(mono):
                yield mono
            if last:
                return


def _open(data: bytes) -> Any:
    try:
        return soundfile.SoundFile(io.BytesIO(data))
    except (soundfile.LibsndfileError, RuntimeError, TypeError, ValueError):
        raise MediaError("file", f"is not a sound file of a known kind; send {_KINDS}") from None


def _check_header(file: Any, max_seconds: float) -> None:
    if not 0 < file.samplerate <= _MAX_RATE or not 0 < file.channels <= _MAX_CHANNELS:
        raise MediaError("file", "has a sampling rate or channels as no recording has")
    # Some kinds do not know their length: those are counted as they are read.
    if 0 < file.frames < 2**62 and file.frames > max_seconds * file.samplerate:
        raise _too_long(max_seconds)


def _read(file: Any, frames: int) -> Samples:
    try:
        block: Samples = file.read(frames, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, ValueError):
        raise MediaError("file", "is broken: its sound cannot be decoded to its end") from None
    if not np.isfinite(block).all():
        raise MediaError("file", "is broken: it holds samples that are no numbers")
    return block


def _too_long(max_seconds: float) -> MediaError:
    return MediaError(
        "file", f"is longer than {max_seconds:g} s; cut it into parts and send them one by one"
    )
