"""Which neighbours fit, and what is said of those that do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import tensor_pb2
from services.shard.handshake import MismatchError, check_chain


def _info(index: int, first: int, end: int) -> pb.StageInfo:
    return pb.StageInfo(
        protocol_version=1,
        index=index,
        stages=3,
        first_layer=first,
        end_layer=end,
        model_layers=6,
        model_fingerprint="f" * 64,
        compute_dtype=tensor_pb2.DTYPE_FLOAT32,
        wire_dtype=tensor_pb2.DTYPE_FLOAT32,
        address=f"host{index}:1",
        kind=pb.MODEL_KIND_EXTRACTIVE,
    )


STAGES = (_info(0, 0, 2), _info(1, 2, 4), _info(2, 4, 6))


def test_a_fitting_ring_is_accepted_at_every_stage() -> None:
    check_chain(STAGES[:1], STAGES[1])
    check_chain(STAGES[:2], STAGES[2])
    check_chain(STAGES, STAGES[0])


def _changed(index: int, change: Callable[[pb.StageInfo], None]) -> pb.StageInfo:
    info = pb.StageInfo()
    info.CopyFrom(STAGES[index])
    change(info)
    return info


def _set(**fields: object) -> Callable[[pb.StageInfo], None]:
    def change(info: pb.StageInfo) -> None:
        for name, value in fields.items():
            setattr(info, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set(model_fingerprint="0" * 64), "another model"),
        (_set(protocol_version=2), "protocol"),
        (_set(stages=2), "pipeline of 2"),
        (_set(compute_dtype=tensor_pb2.DTYPE_BFLOAT16), "DTYPE_BFLOAT16"),
        (_set(wire_dtype=tensor_pb2.DTYPE_FLOAT16), "wire dtype"),
        (_set(kind=pb.MODEL_KIND_GENERATIVE), "MODEL_KIND_GENERATIVE"),
        (_set(kv_block_tokens=32), "KV blocks of 32 tokens"),
        (_set(end_layer=3), "gap or overlap"),
        (_set(end_layer=1), "gap or overlap"),
        (_set(index=1, first_layer=2), "begins with stage 1"),
    ],
)
def test_a_stage_0_that_does_not_fit_is_refused(
    change: Callable[[pb.StageInfo], None], says: str
) -> None:
    with pytest.raises(MismatchError, match=says):
        check_chain([_changed(0, change)], STAGES[1])


def test_order_and_completeness_are_checked() -> None:
    with pytest.raises(MismatchError, match="followed by stage 2"):
        check_chain(STAGES[:1], STAGES[2])
    with pytest.raises(MismatchError, match="without any stage"):
        check_chain([], STAGES[1])
    with pytest.raises(MismatchError, match="should have 3 stages"):
        check_chain(STAGES[:2], STAGES[0])
    other_head = _changed(0, _set(address="elsewhere:1"))
    with pytest.raises(MismatchError, match="another stage 0"):
        check_chain([other_head, *STAGES[1:]], STAGES[0])
    short = _changed(2, _set(end_layer=5))
    with pytest.raises(MismatchError, match="last stage"):
        check_chain(STAGES[:2], short)
