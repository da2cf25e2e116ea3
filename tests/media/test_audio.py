"""Sound files become windows, and windows what transformers' own extractor makes of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from numpy.typing import NDArray
from transformers import WhisperFeatureExtractor

from miaotui.media.audio import read_windows
from miaotui.media.errors import MediaError
from miaotui.media.features import FeatureExtractor, MediaLimits, load_extractor

RATE = 16_000


def tone(seconds: float, rate: int = RATE) -> NDArray[np.float32]:
    """A tone that rises, between -0.5 and 0.5."""
    times = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (200 + 40 * times) * times)).astype(np.float32)


def encoded(
    samples: NDArray[np.float32], rate: int = RATE, kind: str = "WAV", subtype: str = "FLOAT"
) -> bytes:
    """A sound file; samples [frames] or [frames, channels]."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> FeatureExtractor:
    """That of a directory with windows of 4 s and 20 mel bins."""
    directory = tmp_path_factory.mktemp("whisper")
    WhisperFeatureExtractor(feature_size=20, chunk_length=4).save_pretrained(directory)
    return load_extractor(directory, "audio", limits=MediaLimits(max_bytes=10_000_000))


@pytest.mark.parametrize("seconds", [0.02, 1.5, 4.0])
def test_features_equal_those_of_transformers(extractor: FeatureExtractor, seconds: float) -> None:
    sound = tone(seconds)
    (made,) = extractor.extract(encoded(sound))
    reference = WhisperFeatureExtractor(feature_size=20, chunk_length=4)
    expected = reference(sound, sampling_rate=RATE, return_tensors="np")["input_features"][0]
    assert made.values.dtype == np.float32
    np.testing.assert_array_equal(made.values, expected)
    assert (made.start_seconds, made.end_seconds) == (0.0, len(sound) / RATE)


@pytest.mark.parametrize(
    ("kind", "subtype", "rate", "close"),
    [
        ("WAV", "PCM_16", 8_000, 1e-3),
        ("FLAC", "PCM_24", 44_100, 1e-3),
        ("OGG", "VORBIS", 48_000, 0.05),
        ("OGG", "OPUS", 48_000, 0.2),
        ("MP3", "MPEG_LAYER_III", 44_100, 0.2),
    ],
)
def test_kinds_rates_and_channels(kind: str, subtype: str, rate: int, close: float) -> None:
    sound = tone(1.0, rate)
    both = np.stack((sound, np.zeros_like(sound)), axis=1)  # half as loud when mixed
    (window,) = read_windows(encoded(both, rate, kind, subtype), RATE, 30.0, max_seconds=60)
    expected = soxr.resample(sound / 2, rate, RATE)
    assert abs(len(window.samples) - len(expected)) < 0.15 * RATE
    length = min(len(window.samples), len(expected))
    apart = window.samples[:length] - expected[:length]
    assert np.sqrt(np.mean(np.square(apart))) < close


def test_resampling_by_blocks_is_resampling_of_the_whole() -> None:
    sound = tone(17.0, 44_100)
    (window,) = read_windows(encoded(sound, 44_100), RATE, 30.0, max_seconds=60)
    np.testing.assert_allclose(window.samples, soxr.resample(sound, 44_100, RATE), atol=1e-6)


def test_long_sounds_are_cut_where_they_are_quiet_and_nothing_is_lost() -> None:
    sound = tone(75.0)
    for pause in (27.0, 52.5):
        sound[round(pause * RATE) : round((pause + 0.4) * RATE)] = 0.0
    windows = list(read_windows(encoded(sound), RATE, 30.0, max_seconds=100))
    np.testing.assert_array_equal(np.concatenate([one.samples for one in windows]), sound)
    cuts = [one.end_seconds for one in windows]
    assert 27.0 < cuts[0] < 27.4
    assert 52.5 < cuts[1] < 52.9
    assert cuts[-1] == 75.0
    assert [one.start_seconds for one in windows] == [0.0, *cuts[:-1]]
    assert max(len(one.samples) for one in windows) <= 30 * RATE


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "empty"),
        (b"no sound at all" * 100, "known kind"),
        (encoded(np.zeros(0, np.float32)), "holds no sound"),
        (encoded(np.full(RATE, np.nan, np.float32)), "no numbers"),
        (bytes(10_000_001), "more than 10000000 bytes"),
        (encoded(np.full(RATE, 1e30, np.float32)), "too large"),
        (encoded(tone(2.0), kind="FLAC", subtype="PCM_16")[:9000], "broken"),
        # Others know these kinds.
        (encoded(tone(0.1), kind="SDS", subtype="PCM_16"), "known kind"),
        (encoded(tone(0.1), kind="AIFF", subtype="PCM_16"), "known kind"),
        # Some kilobytes that would be hours.
        (encoded(tone(0.1), rate=1), "sampling rate"),
        (encoded(np.zeros((9, 33), np.float32)), "channels"),
    ],
    ids=range(11),  # files hold the time at which they were made, and names must not
)
def test_what_is_refused(extractor: FeatureExtractor, data: bytes, problem: str) -> None:
    with pytest.raises(MediaError, match=problem):
        list(extractor.extract(data))


def test_a_header_that_points_before_the_beginning_prints_nothing(
    extractor: FeatureExtractor, capfd: pytest.CaptureFixture[str]
) -> None:
    # The length of its tag, in seven bits a byte, is negative.
    data = b"ID3\x04\x00\x00\xff\xff\xff\xff" + bytes(500)
    with pytest.raises(MediaError, match="known kind"):
        list(extractor.extract(data))
    assert "Traceback" not in capfd.readouterr().err


def test_sound_of_many_channels_is_read_in_smaller_blocks() -> None:
    rate, channels, frames = 192_000, 32, 200_000
    sound = np.zeros((frames, channels), np.float32)
    sound[frames // 2 :] = 0.5
    (window,) = read_windows(encoded(sound, rate, "WAV", "PCM_16"), rate, 30.0, max_seconds=60)
    assert len(window.samples) == frames
    np.testing.assert_allclose(window.samples, sound[:, 0], atol=1e-4)


def test_too_long_a_sound_is_refused_by_its_header() -> None:
    with pytest.raises(MediaError, match=r"longer than 1\.5 s"):
        next(read_windows(encoded(tone(2.0)), RATE, 30.0, max_seconds=1.5))


def test_a_directory_without_an_extractor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        load_extractor(tmp_path, "audio")
