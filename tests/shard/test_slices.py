"""A decoder's frames: what is sent arrives; what cannot be is refused, not computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miaotui.engine.batch import Batch, DropCode, SequenceMeta
from miaotui.engine.decode.types import (
    DecodeSlice,
    FinishReason,
    GenerationUpdate,
    GenerationUsage,
    PlaceLogprobs,
    SampledTokens,
    SamplingParams,
    SequenceStart,
    TextDelta,
    TokenIds,
)
from miaotui.engine.tensors import TensorFormatError
from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import tensor_pb2
from services.shard.codec import Frame, decode, encode
from services.shard.convert import batch_to_frame, frame_to_batch
from services.shard.generate import read_request, update_to_proto
from services.shard.sampling import InvalidFieldError, read_sampling, sampling_to_proto
from services.shard.slices import DecodeLimits

VOCABULARY, CONTEXT, BLOCKS, BLOCK_TOKENS, WIDTH = 100, 64, 10, 4, 3
LIMITS = DecodeLimits(VOCABULARY, CONTEXT, BLOCKS, BLOCK_TOKENS)


def _ids(*values: int) -> TokenIds:
    return np.asarray(values, np.int32)


def _travelled(batch: Batch, *, results: bool = False, limits: DecodeLimits = LIMITS) -> Batch:
    frame = decode(encode(batch_to_frame(batch, "float32", results=results)))
    return frame_to_batch(frame, WIDTH, limits)


def _batch() -> Batch:
    sampling = SamplingParams(temperature=0.5, top_k=3, seed=2**64 - 1, logit_bias={7: -2.5})
    trace = {"traceparent": f"00-{7:032x}-{9:016x}-01"}
    metas = [
        SequenceMeta(
            "first",
            0,
            6,
            trace=trace,
            decode=DecodeSlice(
                1, 0, _ids(3, 9), 0, begin=SequenceStart(sampling, _ids(1, 2), _ids(99))
            ),
        ),
        SequenceMeta(
            "next", 1, 3, trace=trace, decode=DecodeSlice(2, 5, _ids(0, 1), 3, _ids(4, 5))
        ),
    ]
    return Batch(8, metas, torch.arange(27, dtype=torch.float32).view(9, 3), released=[5, 6])


def test_slices_arrive_as_they_were_sent() -> None:
    sent, got = _batch(), _travelled(_batch())
    assert got.hidden is not None
    assert sent.hidden is not None
    assert torch.equal(got.hidden, sent.hidden)
    assert got.released == [5, 6]
    for before, after in zip(sent.sequences, got.sequences, strict=True):
        a, b = before.decode, after.decode
        assert a is not None
        assert b is not None
        assert (a.sequence_id, a.start, a.samples) == (b.sequence_id, b.start, b.samples)
        assert a.blocks.tolist() == b.blocks.tolist()
        assert a.draft.tolist() == b.draft.tolist()
        assert (before.request_id, before.length) == (after.request_id, after.length)
        assert after.deadline == math.inf
    begin, expected = got.sequences[0].decode, sent.sequences[0].decode
    assert begin is not None
    assert begin.begin is not None
    assert expected is not None
    assert expected.begin is not None
    assert begin.begin.sampling == expected.begin.sampling
    assert begin.begin.prompt.tolist() == [1, 2]
    assert begin.begin.written.tolist() == [99]
    # Prompts are reported by every stage, the tokens that follow are not.
    assert got.sequences[0].trace == sent.sequences[0].trace
    assert got.sequences[1].trace == {}


def test_sources_travel_as_rows_until_tokens_are_embedded() -> None:
    """Of an encoder-decoder model: four rows of the sequence that begins, then one a token."""
    sent = _batch()
    for meta in sent.sequences:
        assert meta.decode is not None
        meta.decode.tokens = np.arange(meta.length, dtype=np.int32)
        meta.decode.blocks = _ids(8, *meta.decode.blocks)
    for embedded, rows in ((False, 4), (True, 4 + 9)):
        limits = replace(LIMITS, source_rows=4, embedded=embedded)
        sent.hidden = torch.arange(rows * 3, dtype=torch.float32).view(rows, 3)
        got = _travelled(sent, limits=limits)
        assert got.hidden is not None
        assert torch.equal(got.hidden, sent.hidden)
        for meta in got.sequences:
            assert meta.decode is not None
            assert meta.decode.tokens.tolist() == list(range(meta.length))
        with pytest.raises(TensorFormatError, match="rows of width"):
            _travelled(sent, limits=replace(limits, source_rows=3))
    with pytest.raises(TensorFormatError, match="KV blocks"):
        _travelled(sent, limits=replace(limits, source_rows=5))
    with pytest.raises(TensorFormatError, match="token ids"):
        _travelled(_batch(), limits=replace(LIMITS, source_rows=0 + 1, block_tokens=64))
    # Nothing begins, nothing is embedded yet: no rows at all.
    sent = Batch(9, sent.sequences[1:], torch.zeros(0, 3))
    got = _travelled(sent, limits=replace(LIMITS, source_rows=4, embedded=False))
    assert got.hidden is not None
    assert got.hidden.shape == (0, 3)


def test_sampled_tokens_arrive_and_nothing_else_does() -> None:
    batch = _batch()
    place = PlaceLogprobs((4, -0.5), ((4, -0.5), (9, -1.25)))
    batch.hidden, batch.sampled = (
        None,
        [
            SampledTokens(1, _ids(4), [place]),
            SampledTokens(2, _ids(4, 5, 6), complete=True),
        ],
    )
    got = _travelled(batch, results=True)
    assert (got.batch_id, got.hidden, got.sequences) == (8, None, [])
    assert got.sampled is not None
    assert [item.token_ids.tolist() for item in got.sampled] == [[4], [4, 5, 6]]
    assert got.sampled[0].logprobs == [place]
    assert [item.complete for item in got.sampled] == [False, True]


def test_a_failed_batch_says_why() -> None:
    batch = _batch()
    batch.fail(DropCode.INTERNAL, "broken")
    got = _travelled(batch, results=True)
    assert [(d.request_id, d.message) for d in got.dropped] == [
        ("first", "broken"),
        ("next", "broken"),
    ]
    assert not got.sampled


def _decode(frame: Frame, index: int = 0) -> pb.DecodeSlice:
    return frame.message.batch.sequences[index].decode


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: setattr(_decode(f), "blocks", b"abc"),
        lambda f: setattr(_decode(f), "blocks", _ids(3).tobytes()),
        lambda f: setattr(_decode(f), "blocks", _ids(3, BLOCKS).tobytes()),
        lambda f: setattr(_decode(f), "blocks", _ids(3, -1).tobytes()),
        lambda f: setattr(_decode(f), "start", CONTEXT),
        lambda f: setattr(_decode(f), "start", 2**32 - 1),
        lambda f: setattr(_decode(f), "sequence_id", 0),
        lambda f: setattr(_decode(f), "samples", 2),
        lambda f: setattr(_decode(f), "draft", _ids(1).tobytes()),
        lambda f: setattr(_decode(f, 1), "samples", 1),
        lambda f: setattr(_decode(f, 1), "draft", _ids(1, 2, 3).tobytes()),
        lambda f: setattr(_decode(f, 1), "draft", _ids(1, VOCABULARY).tobytes()),
        lambda f: setattr(_decode(f, 1), "draft", b"abcde"),
        lambda f: f.message.batch.sequences[1].ClearField("decode"),
        lambda f: setattr(_decode(f).begin, "written", _ids(-1).tobytes()),
        lambda f: setattr(_decode(f).begin, "prompt", b"a"),
        lambda f: setattr(_decode(f).begin.sampling, "top_p", 7),
    ],
)
def test_slices_that_cannot_be_are_refused(spoil: Callable[[Frame], Any]) -> None:
    frame = batch_to_frame(_batch(), "float32", results=False)
    spoil(frame)
    with pytest.raises(TensorFormatError):
        frame_to_batch(frame, WIDTH, LIMITS)


@pytest.mark.parametrize(
    "sampled",
    [
        pb.SampledTokens(sequence_id=1),
        pb.SampledTokens(sequence_id=1, token_ids=b"abc"),
        pb.SampledTokens(sequence_id=1, token_ids=_ids(VOCABULARY).tobytes()),
        pb.SampledTokens(
            sequence_id=1, token_ids=_ids(1, 2).tobytes(), logprobs=[pb.PlaceLogprobs()]
        ),
    ],
)
def test_sampled_tokens_that_cannot_be_are_refused(sampled: pb.SampledTokens) -> None:
    results = pb.Results(batch_id=1, sampled=[sampled])
    with pytest.raises(TensorFormatError):
        frame_to_batch(Frame(pb.ForwardRequest(results=results)), WIDTH, LIMITS)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    st.builds(
        SamplingParams,
        temperature=st.floats(0, 2, width=32),
        top_k=st.integers(0, VOCABULARY),
        top_p=st.floats(0.125, 1, width=32),
        min_p=st.floats(0, 1, width=32),
        repetition_penalty=st.floats(0.5, 2, width=32),
        presence_penalty=finite,
        frequency_penalty=finite,
        seed=st.integers(0, 2**64 - 1),
        logprobs=st.none() | st.integers(0, 20),
        logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), finite, max_size=5),
        json_schema=st.text(max_size=50),
    )
)
def test_sampling_parameters_travel(params: SamplingParams) -> None:
    message = pb.SamplingParams.FromString(sampling_to_proto(params).SerializeToString())
    assert read_sampling(message, VOCABULARY) == params


def test_what_is_absent_is_greedy() -> None:
    assert read_sampling(pb.SamplingParams(), VOCABULARY) == SamplingParams()


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("temperature", {"temperature": -0.5}),
        ("temperature", {"temperature": math.nan}),
        ("temperature", {"temperature": math.inf}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.5}),
        ("min_p", {"min_p": -0.1}),
        ("min_p", {"min_p": 1.1}),
        ("repetition_penalty", {"repetition_penalty": 0.0}),
        ("presence_penalty", {"presence_penalty": math.inf}),
        ("frequency_penalty", {"frequency_penalty": math.nan}),
        ("logprobs", {"logprobs": 21}),
        ("logit_bias", {"logit_bias": {VOCABULARY: 1.0}}),
        ("logit_bias", {"logit_bias": {1: math.nan}}),
        ("json_schema", {"json_schema": "x" * 70_000}),
    ],
)
def test_sampling_parameters_out_of_bounds_are_named(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidFieldError, match=rf"sampling\.{field}"):
        read_sampling(pb.SamplingParams(**fields), VOCABULARY)


def _read(**fields: Any) -> Any:
    fields = {"input_ids": _ids(1, 2).tobytes()} | fields
    return read_request(pb.GenerateRequest(**fields), vocabulary=VOCABULARY, context=CONTEXT)


def _features(dtype: int, shape: list[int], size: int) -> pb.Features:
    header = tensor_pb2.TensorHeader(dtype=tensor_pb2.Dtype.ValueType(dtype), shape=shape)
    return pb.Features(header=header, data=bytes(size))


def test_features_are_read_in_place() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    message = _features(1, [2, 3], 24)
    message.data = values.tobytes()
    source = _read(features=message).source
    assert source.dtype == np.float32
    assert source.tolist() == values.tolist()
    assert _read().source is None


def test_requests_are_read() -> None:
    request = _read(max_tokens=5, stop_token_ids=[2, 3], n=2, draft_tokens=0)
    assert request.prompt.tolist() == [1, 2]
    assert (request.max_tokens, request.n, request.draft_tokens) == (5, 2, 0)
    assert request.stop_token_ids == {2, 3}
    plain = _read()
    assert (plain.n, plain.draft_tokens, plain.max_tokens) == (1, None, 0)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("input_ids", {"input_ids": b""}),
        ("input_ids", {"input_ids": b"abc"}),
        ("input_ids", {"input_ids": _ids(VOCABULARY).tobytes()}),
        ("input_ids", {"input_ids": _ids(-1).tobytes()}),
        ("input_ids", {"input_ids": _ids(*[1] * CONTEXT).tobytes()}),
        ("n", {"n": 129}),
        ("stop_token_ids", {"stop_token_ids": [VOCABULARY]}),
        ("stop_token_ids", {"stop_token_ids": [1] * 2000}),
        ("features.header.dtype", {"features": _features(2, [3], 6)}),
        ("features.header.dtype", {"features": pb.Features(data=bytes(4))}),
        ("features.header.shape", {"features": _features(1, [-3], 12)}),
        ("features.data", {"features": _features(1, [2, 3], 23)}),
        ("sampling.json_schema", {"sampling": pb.SamplingParams(json_schema="{")}),
        ("sampling.json_schema", {"sampling": pb.SamplingParams(json_schema='{"type": "odd"}')}),
    ],
)
def test_requests_that_cannot_be_are_refused(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidFieldError, match=f"^{field}: "):
        _read(**fields)


def test_news_are_told() -> None:
    usage = GenerationUsage(2, 1, 3, 4, 5, 0.25, 6)
    update = GenerationUpdate([TextDelta(1, _ids(7, 8), finish_reason=FinishReason.LENGTH)], usage)
    message = update_to_proto(update)
    (delta,) = message.deltas
    assert (delta.index, delta.finish_reason) == (1, pb.FINISH_REASON_LENGTH)
    assert np.frombuffer(delta.token_ids, "<i4").tolist() == [7, 8]
    assert message.usage == pb.GenerationUsage(
        prompt_tokens=2,
        cached_tokens=1,
        completion_tokens=3,
        drafted_tokens=4,
        accepted_tokens=5,
        queue_micros=250_000,
        preemptions=6,
    )
    assert not update_to_proto(GenerationUpdate([TextDelta(0, _ids(1))])).HasField("usage")
