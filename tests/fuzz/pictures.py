"""Pictures: right ones, and ones that are broken, cut off, or far larger than they look."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from functools import lru_cache
from typing import Any

from PIL import Image

from tests.fuzz import values
from tests.fuzz.cases import MARK

_KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO")
_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SIDES = (1, 7, 40, 1_000, 6_400, 65_535, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 0)
# A picture that is within the bounds, but takes a while.
_BOMB_SIDE = 6_000


def picture(chance: random.Random) -> bytes:
    """A file's bytes; most are small."""
    act = chance.randrange(12)
    if act <= 5:
        data = _saved(chance.choice(_KINDS), chance.choice(_MODES), chance.choice((1, 16, 40)))
        if act <= 1:
            return data
        if act == 2:
            return data[: chance.randrange(len(data) + 1)]
        return values.mutated(chance, data)
    if act <= 8:
        return _png(chance)
    if act == 9:
        return _resized(chance)
    if act == 10 and chance.random() < 0.1:
        return _bomb(chance.choice((0, 2, 3, 4, 6)))
    heads = (_SIGNATURE, b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\xff\xff\xff\xffWEBPVP8X", b"")
    return chance.choice((*heads, MARK.encode())) + chance.randbytes(chance.choice((0, 20, 4_000)))


def chat(chance: random.Random) -> values.Json:
    """A chat about a picture, or about what is none."""
    data = base64.b64encode(picture(chance)).decode()
    if chance.random() < 0.05:
        data = chance.choice((data[:-1], data + "=", data[:9] + "\n" + data[9:], "%%%", ""))
    kind = chance.choice(("png", "png", "jpeg", "x-anything", "svg+xml"))
    part = {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}
    words = {"type": "text", "text": values.text(chance)}
    content = chance.choice(([part], [part], [words, part], [part, words], [part, part], part))
    messages = [{"role": "user", "content": content}]
    if chance.random() < 0.2:
        messages.insert(0, {"role": "system", "content": values.text(chance)})
    body: dict[str, Any] = {
        "messages": messages,
        "max_tokens": chance.choice((1, 6, 6, 6)),
        "no_cache": True,
    }
    body |= {"model": "seer"} if chance.random() < 0.9 else {}
    if chance.random() < 0.2:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return values.spoilt(chance, body) if chance.random() < 0.2 else body


@lru_cache(maxsize=256)
def _saved(kind: str, mode: str, side: int) -> bytes:
    pixels = random.Random(side).randbytes(side * side * 3)
    drawn = Image.frombytes("RGB", (side, side), pixels)
    made = io.BytesIO()
    for last in (mode, "RGB"):
        try:
            drawn.convert(last).save(made, kind)
            break
        except (OSError, ValueError, KeyError):  # not every kind has every mode
            made = io.BytesIO()
    return made.getvalue()


@lru_cache(maxsize=8)
def _packed(size: int) -> bytes:
    return zlib.compress(bytes(size))


def _chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    size = struct.pack(">I", len(data) if length is None else length)
    return size + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(chance: random.Random) -> bytes:
    """A PNG whose header says anything, with checksums that are right."""
    wide, high = chance.choice(_SIDES), chance.choice(_SIDES)
    if chance.random() < 0.4:
        wide, high = chance.choice((1, 7, 40)), chance.choice((1, 7, 40))
    depth, colour = chance.choice((1, 8, 8, 16, 3)), chance.choice((0, 2, 2, 3, 4, 6, 5))
    head = struct.pack(">IIBBB", wide, high, depth, colour, 0)
    chunks = [(b"IHDR", head + bytes([chance.choice((0, 0, 0, 9)), chance.choice((0, 0, 1, 7))]))]
    rows = min(high, 40) * (1 + min(wide, 40) * 8)
    pixels = chance.choice((bytes(rows), chance.randbytes(rows), b"\4" * rows, b""))
    extra = (
        (b"PLTE", chance.randbytes(chance.choice((0, 3, 4, 768, 900)))),
        (b"tRNS", chance.randbytes(chance.choice((0, 1, 2, 6, 256, 300)))),
        (b"zTXt", b"a\0\0" + _packed(chance.choice((10, 2_000_000)))),
        (b"iCCP", b"a\0\0" + _packed(chance.choice((10, 2_000_000)))),
        (b"iTXt", b"a\0\1\0\0\0" + zlib.compress(MARK.encode() * 50_000)),
        (b"eXIf", b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0" + chance.randbytes(8)),
        (b"gAMA", bytes(4)),
        (b"acTL", struct.pack(">II", chance.choice((1, 2**31)), 0)),
        (b"fcTL", struct.pack(">IIIIIHHBB", 0, *chance.choices(_SIDES, k=4), 1, 1, 0, 0)),
    )
    chunks += [one for one in extra if chance.random() < 0.2]
    chunks += [(b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    if chance.random() < 0.1:
        chance.shuffle(chunks)
    lengths = (None, None, None, None, None, None, None, 0, 2**31 - 1, 2**32 - 1)
    return _SIGNATURE + b"".join(_chunk(*one, chance.choice(lengths)) for one in chunks)


def _resized(chance: random.Random) -> bytes:
    """A JPEG, GIF or WebP of a few pixels that claims to be of any size."""
    kind = chance.choice(("JPEG", "GIF", "WEBP"))
    data = bytearray(_saved(kind, "RGB", 16))
    size = [side & 0xFFFF for side in chance.choices(_SIDES, k=2)]
    if kind == "JPEG":
        place = data.index(b"\xff\xc0") + 5  # behind the frame's marker, length and depth
        data[place : place + 4] = struct.pack(">HH", *size)
    elif kind == "GIF":
        # The screen's size, or the first picture's on it.
        place = 6 if chance.random() < 0.5 else data.index(b",") + 5
        data[place : place + 4] = struct.pack("<HH", *size)
    else:
        place = data.index(b"\x9d\x01\x2a") + 3
        data[place : place + 4] = struct.pack("<HH", *size)
    return bytes(data)


@lru_cache(maxsize=8)
def _bomb(colour: int) -> bytes:
    """A picture of some kilobytes whose pixels take a hundred megabytes or more."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    head = struct.pack(">IIBBBBB", _BOMB_SIDE, _BOMB_SIDE, 8, colour, 0, 0, 0)
    row = bytes(1 + _BOMB_SIDE * channels)
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(_BOMB_SIDE)) + packer.flush()
    # Of each kind what makes it take the most: colours, or one that is transparent.
    more = {0: (b"tRNS", bytes(2)), 2: (b"tRNS", bytes(6)), 3: (b"PLTE", bytes(768))}
    chunks = [(b"IHDR", head), (b"IDAT", pixels), (b"IEND", b"")]
    if colour in more:
        chunks.insert(1, more[colour])
    return _SIGNATURE + b"".join(_chunk(*one) for one in chunks)
