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
# Of all channels together.
_BLOCK_SAMPLES = 2_000_000
# A window is cut at the quietest place of its last seconds, so that no word is cut in two.
CUT_SECONDS = 5.0
_QUIET_SECONDS = 0.2
_HOP_SECONDS = 0.01
# What is left after the last cut is silence or a click, and models make words up of it.
_SHORTEST_SECONDS = 0.05
_KINDS = "WAV, FLAC, OGG (Vorbis, Opus) and MP3"
# libsndfile reads twenty kinds more, some with code that prints what it stumbles over.
_BEGINNINGS = (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS", b"ID3")
_FORMATS = frozenset(("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3"))
# Samples a second that a file may claim: a header can say anything. At 1, a file of some
# kilobytes would be hours long.
_MIN_RATE = 1_000
_MAX_RATE = 384_000
_MAX_CHANNELS = 32
# Of floating-point samples, which mostly lie between -1 and 1: above, their squares overflow.
_LOUDEST = 2.0**31


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
        frames_at_once = min(
            round(_BLOCK_SECONDS * file.samplerate), _BLOCK_SAMPLES // file.channels
        )
        frames = 0
        while True:
            block = _read(file, frames_at_once)
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


class _File(io.BytesIO):
    """Where a damaged header sends the reader to before the beginning, it stays where it is.

    An exception could not leave libsndfile, and would be printed.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def _open(data: bytes) -> Any:
    unknown = MediaError("file", f"is not a sound file of a known kind; send {_KINDS}")
    # MP3 without tags begins with a frame: eleven bits of 1.
    if not data.startswith(_BEGINNINGS) and (data[:1] != b"\xff" or data[1:2] < b"\xe0"):
        raise unknown
    try:
        file = soundfile.SoundFile(_File(data))
    except (soundfile.LibsndfileError, RuntimeError, TypeError, ValueError):
        raise unknown from None
    if file.format not in _FORMATS:
        file.close()
        raise unknown
    return file


def _check_header(file: Any, max_seconds: float) -> None:
    rate, channels = file.samplerate, file.channels
    if not _MIN_RATE <= rate <= _MAX_RATE or not 0 < channels <= _MAX_CHANNELS:
        raise MediaError("file", "has a sampling rate or channels as no recording has")
    # Some kinds do not know their length: those are counted as they are read.
    if 0 < file.frames < 2**62 and file.frames > max_seconds * file.samplerate:
        raise _too_long(max_seconds)


def _read(file: Any, frames: int) -> Samples:
    try:
        block: Samples = file.read(frames, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, ValueError):
        raise MediaError("file", "is broken: its sound cannot be decoded to its end") from None
    # Of no numbers, this is not true either.
    if len(block) and not max(-block.min(), block.max()) <= _LOUDEST:
        raise MediaError("file", "is broken: it holds samples that are no numbers, or too large")
    return block


def _too_long(max_seconds: float) -> MediaError:
    return MediaError(
        "file", f"is longer than {max_seconds:g} s; cut it into parts and send them one by one"
    )
