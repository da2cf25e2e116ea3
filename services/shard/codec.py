"""Frames of the `Forward` stream, without copies of the tensor's bytes.

A frame is a plain `ForwardRequest`, readable by any protobuf implementation. Its last field,
`payload`, is appended to the serialised rest by hand and read as a view of the received
message: protobuf's own accessors would copy it twice on each side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from miaotui.v1 import shard_pb2 as pb

# Field 15, wire type 2 (length-delimited): https://protobuf.dev/programming-guides/encoding
_PAYLOAD_TAG = (15 << 3) | 2
_EMPTY = memoryview(b"")


class FrameError(ValueError):
    """The bytes are not a `ForwardRequest`."""


@dataclass(slots=True)
class Frame:
    """A message of the stream and the tensor bytes that travel with it."""

    message: pb.ForwardRequest
    payload: memoryview = _EMPTY


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode(frame: Frame) -> bytes:
    """A frame to one protobuf message; the payload is copied once, into the result."""
    head = frame.message.SerializeToString()
    if not frame.payload.nbytes:
        return head
    prefix = _varint(_PAYLOAD_TAG) + _varint(frame.payload.nbytes)
    return b"".join((head, prefix, frame.payload))


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise FrameError("truncated or overlong varint")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _skip(data: memoryview, position: int, wire_type: int) -> int:
    if wire_type == 0:
        return _read_varint(data, position)[1]
    if wire_type == 1:
        return position + 8
    if wire_type == 2:
        length, position = _read_varint(data, position)
        return position + length
    if wire_type == 5:
        return position + 4
    raise FrameError(f"unknown wire type {wire_type}")


def decode(data: bytes) -> Frame:
    """One protobuf message to a frame; the payload is a view of `data`.

    Raises `FrameError` where the bytes are not a `ForwardRequest`.
    """
    view = memoryview(data)
    payload = _EMPTY
    rest: list[memoryview] = []
    position = kept = 0
    while position < len(view):
        start = position
        tag, position = _read_varint(view, position)
        if tag == _PAYLOAD_TAG:
            length, position = _read_varint(view, position)
            if position + length > len(view):
                raise FrameError("payload runs past the end of the message")
            payload = view[position : position + length]
            rest.append(view[kept:start])
            position += length
            kept = position
        else:
            position = _skip(view, position, tag & 7)
            if position > len(view):
                raise FrameError("field runs past the end of the message")
    rest.append(view[kept:])
    message = pb.ForwardRequest()
    try:
        message.ParseFromString(b"".join(rest))
    except Exception as error:  # protobuf's DecodeError has no stable import path
        raise FrameError("not a ForwardRequest") from error
    return Frame(message, payload)


def split(frame: Frame, part_bytes: int) -> Iterator[Frame]:
    """Cuts a batch or results frame whose payload exceeds `part_bytes` into several."""
    payload = frame.payload
    if payload.nbytes <= part_bytes:
        yield frame
        return
    batch_id = frame.message.batch.batch_id or frame.message.results.batch_id
    yield Frame(frame.message, payload[:part_bytes])
    for offset in range(part_bytes, payload.nbytes, part_bytes):
        part = pb.Part(batch_id=batch_id, offset=offset)
        yield Frame(pb.ForwardRequest(part=part), payload[offset : offset + part_bytes])


class Assembler:
    """Puts frames that travelled in parts together again; one per stream.

    `max_bytes` bounds what a peer can make this process allocate.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._first: Frame | None = None
        self._buffer = bytearray()
        self._filled = 0

    def feed(self, frame: Frame) -> Frame | None:
        """Returns a complete frame, or None while parts are missing.

        Raises `FrameError` for parts that do not follow one another or exceed the bound.
        """
        kind = frame.message.WhichOneof("frame")
        if kind == "part":
            return self._part(frame)
        if self._first is not None:
            if kind == "cancel":
                return frame
            raise FrameError("a frame began before the parts of the one before it had come")
        if kind not in ("batch", "results"):
            return frame
        header = frame.message.batch if kind == "batch" else frame.message.results
        total = header.payload_bytes
        if total > self._max_bytes:
            raise FrameError(f"a tensor of {total} bytes exceeds the limit of {self._max_bytes}")
        if total == frame.payload.nbytes:
            return frame
        if total < frame.payload.nbytes or not frame.payload.nbytes:
            raise FrameError("payload_bytes does not fit the payload")
        self._first = frame
        self._buffer = bytearray(total)
        self._buffer[: frame.payload.nbytes] = frame.payload
        self._filled = frame.payload.nbytes
        return None

    def _part(self, frame: Frame) -> Frame | None:
        part, first = frame.message.part, self._first
        if first is None:
            raise FrameError("a part without a batch before it")
        batch_id = first.message.batch.batch_id or first.message.results.batch_id
        end = self._filled + frame.payload.nbytes
        if part.batch_id != batch_id or part.offset != self._filled or end > len(self._buffer):
            raise FrameError("a part does not continue the one before it")
        if not frame.payload.nbytes:
            raise FrameError("an empty part")
        self._buffer[self._filled : end] = frame.payload
        self._filled = end
        if end < len(self._buffer):
            return None
        whole = Frame(first.message, memoryview(self._buffer))
        self._first, self._buffer, self._filled = None, bytearray(), 0
        return whole
