"""The stream's frames: plain protobuf on the wire, views of the bytes on both sides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaotui.v1 import shard_pb2 as pb
from services.shard.codec import Assembler, Frame, FrameError, decode, encode, split


def _batch(payload: bytes, batch_id: int = 7) -> Frame:
    batch = pb.Batch(batch_id=batch_id, payload_bytes=len(payload), in_flight=3)
    return Frame(pb.ForwardRequest(batch=batch), memoryview(payload))


@given(st.binary(max_size=70_000), st.integers(0, 2**64 - 1))
def test_any_protobuf_implementation_reads_our_frames(payload: bytes, batch_id: int) -> None:
    read = pb.ForwardRequest.FromString(encode(_batch(payload, batch_id)))
    assert read.payload == payload
    assert read.batch.batch_id == batch_id


@given(st.binary(max_size=70_000), st.integers(0, 2**64 - 1))
def test_we_read_frames_of_any_protobuf_implementation(payload: bytes, batch_id: int) -> None:
    message = pb.ForwardRequest(batch=pb.Batch(batch_id=batch_id), payload=payload)
    frame = decode(message.SerializeToString())
    assert frame.payload == payload
    assert frame.message.batch.batch_id == batch_id
    assert not frame.message.payload


def test_fields_after_the_payload_are_read_too() -> None:
    payload = pb.ForwardRequest(payload=b"abc").SerializeToString()
    rest = pb.ForwardRequest(cancel=pb.Cancel(request_ids=["r"])).SerializeToString()
    frame = decode(payload + rest)
    assert bytes(frame.payload) == b"abc"
    assert list(frame.message.cancel.request_ids) == ["r"]


def test_the_payload_is_a_view_of_the_message() -> None:
    data = encode(_batch(b"x" * 1000))
    assert decode(data).payload.obj is data


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_frame_or_an_error(data: bytes) -> None:
    try:
        decode(data)
    except FrameError:
        return


@given(st.integers(0, 57))
def test_truncated_frames_are_refused_or_shorter(cut: int) -> None:
    data = encode(_batch(b"y" * 50))
    try:
        frame = decode(data[:cut])
    except FrameError:
        return
    assert frame.payload.nbytes < 50


@given(st.binary(min_size=1, max_size=5000), st.integers(1, 700))
def test_parts_come_together(payload: bytes, part_bytes: int) -> None:
    assembler = Assembler(1 << 20)
    parts = [decode(encode(part)) for part in split(_batch(payload), part_bytes)]
    assert all(part.payload.nbytes <= part_bytes for part in parts)
    whole = [done for part in parts if (done := assembler.feed(part)) is not None]
    assert len(whole) == 1
    assert whole[0].payload == payload
    assert whole[0].message.batch.in_flight == 3


def test_a_cancel_may_come_between_parts() -> None:
    assembler = Assembler(1 << 20)
    first, second = split(_batch(b"z" * 20), 10)
    cancel = Frame(pb.ForwardRequest(cancel=pb.Cancel(request_ids=["r"])))
    assert assembler.feed(first) is None
    assert assembler.feed(cancel) is cancel
    whole = assembler.feed(second)
    assert whole is not None
    assert whole.payload == b"z" * 20


def _claim(payload_bytes: int, payload: bytes) -> Frame:
    batch = pb.Batch(batch_id=1, payload_bytes=payload_bytes)
    return Frame(pb.ForwardRequest(batch=batch), memoryview(payload))


def _part(offset: int, payload: bytes, batch_id: int = 1) -> Frame:
    part = pb.Part(batch_id=batch_id, offset=offset)
    return Frame(pb.ForwardRequest(part=part), memoryview(payload))


@pytest.mark.parametrize(
    "frames",
    [
        [_claim(1 << 40, b"x")],
        [_claim(2, b"xyz")],
        [_claim(5, b"")],
        [_part(0, b"x")],
        [_claim(5, b"xx"), _claim(5, b"xx")],
        [_claim(5, b"xx"), _part(3, b"x")],
        [_claim(5, b"xx"), _part(2, b"xxxx")],
        [_claim(5, b"xx"), _part(2, b"x", batch_id=2)],
        [_claim(5, b"xx"), _part(2, b"")],
    ],
    ids=[
        *("over the bound", "claims less than it holds", "claims more, holds none"),
        *("part alone", "second batch before the parts", "gap", "too long", "other batch", "empty"),
    ],
)
def test_parts_that_do_not_fit_are_refused(frames: list[Frame]) -> None:
    assembler = Assembler(1 << 20)
    with pytest.raises(FrameError):
        for frame in frames:
            assembler.feed(frame)
