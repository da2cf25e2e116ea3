"""Picture files to RGB pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageOps, UnidentifiedImageError

from miaotui.media.errors import MediaError

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_WHITE = (255, 255, 255, 255)


def read_picture(data: bytes, *, max_pixels: int) -> Image.Image:
    """The picture as it is meant to be seen: RGB, turned by its EXIF orientation.

    Transparent places become white; of an animation it is the first frame. Raises `MediaError`
    where it is broken, of an unknown kind, or has more than `max_pixels` (before it is decoded).
    """
    with _opened(data, max_pixels) as opened:
        opened.load()
        return _over_white(ImageOps.exif_transpose(opened))


def claimed_pixels(data: bytes, *, max_pixels: int) -> int:
    """How many pixels a file says that it has, which need not be true. Raises `MediaError`."""
    with _opened(data, max_pixels) as opened:
        return opened.width * opened.height


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The picture, not decoded yet; what goes wrong with it becomes a `MediaError`."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures; the limit below is ours.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=_FORMATS)
            _check_size(opened.size, max_pixels)
            with opened:
                yield opened
    except MediaError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(max_pixels) from None
    except UnidentifiedImageError:
        raise MediaError("file", f"is not a picture; send {', '.join(_FORMATS)}") from None
    except Exception:  # noqa: BLE001 - a damaged file makes the decoders raise anything
        raise MediaError("file", "is broken: the picture cannot be decoded") from None


def _over_white(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, _WHITE), layered).convert(
            "RGB"
        )
    if picture.mode.startswith("I;16"):  # 16 bits a pixel, which Pillow would cut off at 255
        picture = picture.point(lambda value: value / 256).convert("L")
    return picture.convert("RGB")


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if not width or not height:
        raise MediaError("file", "is a picture without pixels")
    if width * height > max_pixels:
        raise _too_large(max_pixels)


def _too_large(max_pixels: int) -> MediaError:
    return MediaError(
        "file", f"has more than {max_pixels} pixels; make the picture smaller and send it again"
    )
