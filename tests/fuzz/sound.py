"""Sound files: right ones, and ones that are broken, cut off, or claim what cannot be."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import soundfile

from tests.fuzz import values
from tests.fuzz.cases import MARK

_RATE = 16_000
_KINDS = (
    *(("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("RF64", "PCM_24")),
    *(("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")),
    # Nobody is told that these are taken.
    *(("AIFF", "PCM_16"), ("AU", "ULAW"), ("CAF", "ALAC_16"), ("W64", "PCM_16")),
)
_RATES = (*(8_000, 16_000, 44_100, 0, 1, 7, 999, 384_000, 384_001), 2**31 - 1, 2**31, 2**32 - 1)
_CHANNELS = (1, 1, 2, 0, 8, 32, 33, 1024, 65_535)
_BITS = (8, 16, 16, 24, 32, 0, 1, 7, 64, 65_535)
# PCM, ADPCM, float, A-law, GSM, MPEG, extensible, and none.
_CODECS = (1, 1, 1, 2, 3, 6, 7, 17, 49, 80, 85, 0, 0xFFFE, 0xFFFF)
# What ends the names of codecs there.
_EXTENSIBLE = bytes.fromhex("000000001000800000aa00389b71")
_LENGTHS = (0, 1, 3, 2**16, 2**31 - 1, 2**31, 2**32 - 8, 2**32 - 1)


def sound(chance: random.Random) -> bytes:
    """A file's bytes; most are small."""
    act = chance.randrange(10)
    if act <= 4:
        kind, subtype = chance.choice(_KINDS)
        seconds = chance.choice((0.0, 0.05, 0.3, 0.3, 2.5))
        data = _written(kind, subtype, seconds, chance.choice((1, 2)))
        if act <= 1:
            return data
        if act == 2:
            return data[: chance.randrange(len(data) + 1)]
        return values.mutated(chance, data)
    if act <= 7:
        return _wave(chance)
    if act == 8:
        ogg = _written("OGG", chance.choice(("VORBIS", "OPUS")), 0.3, 1)
        return _pages(ogg, lambda page: _spoil(chance, page))
    heads = (b"RIFF", b"fLaC", b"OggS", b"ID3\x04", b"\xff\xfb\x90\x64", b"", MARK.encode())
    return chance.choice(heads) + chance.randbytes(chance.choice((0, 20, 4_000)))


def upload(chance: random.Random, schema: values.Json) -> tuple[str, bytes]:
    """A form's content type and bytes: a sound file, and some of the schema's other fields."""
    boundary = chance.choice(("b0undary", "x" * 70))
    fields = {
        name: values.of_schema(chance, inner, {})
        for name, inner in schema["properties"].items()
        if name != "file" and chance.random() < 0.12
    }
    if chance.random() < 0.2:
        fields = values.spoilt(chance, fields)
    fields = fields if isinstance(fields, dict) else {}
    parts = [
        (f'name="{name}"'.encode("utf-8", "replace"), str(value).encode("utf-8", "replace"))
        for name, value in fields.items()
        if value is not None
    ]
    count = chance.choice((0, 1, 1, 1, 1, 1, 1, 1, 1, 2))
    parts += [(b'name="file"; filename="a.wav"', sound(chance)) for _ in range(count)]
    body = b"".join(
        b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n"
        % (boundary.encode(), name.replace(b"\r", b"").replace(b"\n", b""), value)
        for name, value in parts
    )
    body += f"--{boundary}--\r\n".encode()
    if chance.random() < 0.05:
        body = values.mutated(chance, body)
    return f"multipart/form-data; boundary={boundary}", body


@lru_cache(maxsize=64)
def _written(kind: str, subtype: str, seconds: float, channels: int) -> bytes:
    made = io.BytesIO()
    noise = np.random.default_rng(1).normal(0, 0.1, (round(seconds * _RATE), channels))
    soundfile.write(made, noise.astype(np.float32), _RATE, format=kind, subtype=subtype)

    def number(page: bytearray) -> None:
        page[14:18] = b"fuzz"

    # What the library draws anew each time would make another file of the same case.
    return _pages(made.getvalue(), number)


def _wave(chance: random.Random) -> bytes:
    """A WAV file whose header says anything, and whose chunks are as long as they please."""
    rate, channels = chance.choice(_RATES), chance.choice(_CHANNELS)
    bits, codec = chance.choice(_BITS), chance.choice(_CODECS)
    align = chance.choice((channels * bits // 8, channels * bits // 8, 0, 1, 65_535)) & 0xFFFF
    speed = chance.choice((rate * align & 0xFFFFFFFF, 0, 2**32 - 1))
    shape = struct.pack("<HHIIHH", codec, channels, rate, speed, align, bits)
    if codec == 0xFFFE:
        shape += struct.pack("<HHI", 22, bits, chance.choice((0, 3, 2**32 - 1)))
        shape += (
            struct.pack("<H", chance.choice(_CODECS)) + b"\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
        )
    elif chance.random() < 0.3:
        shape += struct.pack("<HH", 2, chance.choice(_LENGTHS) & 0xFFFF)
    size = chance.choice((0, 1, 64, 3_200, 9_600, 9_600))
    samples = chance.choice((bytes(size), chance.randbytes(size)))
    chunks = [(b"fmt ", shape), (b"data", samples)]
    if chance.random() < 0.3:
        more = chance.choice((b"LIST", b"fact", b"PEAK", b"cue ", b"smpl", b"bext", b"junk"))
        inner = chance.choice((b"", b"INFOINAM\xff\xff\xff\xff", chance.randbytes(40)))
        chunks.insert(chance.randrange(3), (more, inner))
    if chance.random() < 0.1:
        chance.shuffle(chunks)
    body = b""
    for name, inner in chunks:
        length = len(inner) if chance.random() < 0.75 else chance.choice(_LENGTHS)
        body += name + struct.pack("<I", length) + inner + bytes(len(inner) % 2)
    whole = len(body) + 4 if chance.random() < 0.75 else chance.choice(_LENGTHS)
    head = chance.choice((b"RIFF", b"RIFF", b"RIFF", b"RIFX", b"RF64"))
    return head + struct.pack("<I", whole) + b"WAVE" + body


def _spoil(chance: random.Random, page: bytearray) -> None:
    if chance.random() < 0.5:
        return
    act = chance.randrange(4)
    if act == 0:
        # How far the stream has come.
        page[6:14] = struct.pack("<q", chance.choice((-1, -(2**63), 2**63 - 1, 2**40, 0)))
    elif act == 1:
        page[5] = chance.randrange(8)  # whether it is the first, the last, a continuation
    elif act == 2:
        page[18:22] = struct.pack("<I", chance.choice((0, 7, 2**32 - 1)))
    else:
        place = chance.randrange(27, len(page))
        page[place] = chance.randrange(256)


def _pages(data: bytes, change: Callable[[bytearray], None]) -> bytes:
    """Ogg with its pages changed, and their checksums right; other kinds as they are."""
    if not data.startswith(b"OggS"):
        return data
    made = []
    for part in data.split(b"OggS")[1:]:
        page = bytearray(b"OggS" + part)
        change(page)
        page[22:26] = bytes(4)
        page[22:26] = struct.pack("<I", _checksum(bytes(page)))
        made.append(page)
    return b"".join(made)


def _checksum(page: bytes) -> int:
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1) ^ (0x104C11DB7 if value & 0x80000000 else 0)
    return value
