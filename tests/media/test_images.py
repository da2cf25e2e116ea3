"""Pictures become pixels, and pixels what transformers' own processor makes of them."""

from __future__ import annotations

import io
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from miaotui.media.budget import Budget
from miaotui.media.errors import MediaError
from miaotui.media.features import FeatureExtractor, MediaLimits, load_extractor, modality_of
from miaotui.media.images import read_picture

MOST = 1_000_000


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture of random pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> FeatureExtractor:
    """That of a directory with pictures of 16 by 16."""
    directory = tmp_path_factory.mktemp("captioner")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(directory)
    return load_extractor(directory, "image", limits=MediaLimits(max_pixels=MOST))


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_features_equal_those_of_transformers(extractor: FeatureExtractor, mode: str) -> None:
    image = picture(mode)
    (made,) = extractor.extract(encoded(image))
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    expected = processor(image.convert("RGB"), return_tensors="np")["pixel_values"][0]
    assert made.values.shape == (3, 16, 16)
    assert made.values.dtype == np.float32
    np.testing.assert_array_equal(made.values, expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_kinds(kind: str) -> None:
    data = encoded(picture(), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(read_picture(data, max_pixels=MOST)), expected)


def test_a_photo_is_turned_as_its_camera_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    turned = read_picture(encoded(picture(size=(40, 30)), exif=exif), max_pixels=MOST)
    assert turned.size == (30, 40)
    np.testing.assert_array_equal(
        np.asarray(turned), np.rot90(np.asarray(picture(size=(40, 30))), 3)
    )


def test_transparent_places_are_white() -> None:
    clear = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    clear.putpixel((1, 0), (200, 0, 0, 255))
    seen = np.asarray(read_picture(encoded(clear), max_pixels=MOST))
    assert seen.tolist() == [[[255, 255, 255], [200, 0, 0]]]


def test_sixteen_bits_are_scaled_not_cut_off() -> None:
    deep = Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], np.uint16))
    seen = np.asarray(read_picture(encoded(deep), max_pixels=MOST))
    assert seen[0, :, 0].tolist() == [0, 128, 255]


def bomb(width: int, height: int) -> bytes:
    """The head of a PNG that claims so many pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "empty"),
        (b"no picture" * 50, "not a picture"),
        (encoded(picture(), "BMP"), "not a picture"),
        (encoded(picture(size=(300, 300)))[:5000], "broken"),
        (bomb(1001, 1000), "more than 1000000 pixels"),
        (bomb(60_000, 60_000), "more than 1000000 pixels"),
    ],
)
def test_what_is_refused(extractor: FeatureExtractor, data: bytes, problem: str) -> None:
    with pytest.raises(MediaError, match=problem):
        list(extractor.extract(data))


def test_pictures_read_at_once_share_a_bound() -> None:
    budget, held, peak, turn = Budget(10), 0, 0, threading.Lock()

    def read(pixels: int) -> None:
        nonlocal held, peak
        with budget.taking(pixels):
            with turn:
                held += pixels
                peak = max(peak, held)
            for _ in range(100):
                time.sleep(0)  # lets the others go on
            with turn:
                held -= pixels

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, [3, 10, 4, 5, 1, 7, 2, 6] * 20))
        # More than there is waits for all of it, not for ever.
        assert pool.submit(lambda: budget.taking(11).__enter__()).result(60) is None
    assert peak == 10
    assert held == 0


def test_a_directory_without_a_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        load_extractor(tmp_path, "image")


def test_what_models_take() -> None:
    assert modality_of({"model_type": "whisper"}) == "audio"
    assert modality_of({"model_type": "vision-encoder-decoder"}) == "image"
    assert modality_of({"model_type": "llama"}) is None
