"""What neighbouring stages compare before they serve."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from miaotui.v1 import shard_pb2 as pb
from miaotui.v1 import tensor_pb2

PROTOCOL_VERSION = 1
# Addresses, and names of directories in any script.
_WORD = re.compile(r"[\w.:\[\]+@-]{1,255}")


class MismatchError(Exception):
    """Two stages do not belong together; the message says why and what to do."""


def _word(text: str) -> str:
    """What a peer calls itself or its model, as long as it looks like that.

    Refusals are logged, and a log is no place for whatever a stranger sends.
    """
    return text if _WORD.fullmatch(text) else "(unprintable)"


def _layers(info: pb.StageInfo) -> str:
    return f"{info.first_layer}-{info.end_layer}"


def _same(own: pb.StageInfo, other: pb.StageInfo) -> None:
    """Checks what all stages of a pipeline share."""
    who = f"stage {other.index} at {_word(other.address)}"
    if own.protocol_version != other.protocol_version:
        raise MismatchError(
            f"{who} speaks stream protocol {other.protocol_version}, stage {own.index} speaks "
            f"{own.protocol_version}; run the same release everywhere"
        )
    if own.model_fingerprint != other.model_fingerprint:
        raise MismatchError(
            f"{who} holds another model ({_word(other.model_name)!r}, fingerprint "
            f"{_word(other.model_fingerprint[:12])}) than stage {own.index} ({own.model_name!r}, "
            f"{own.model_fingerprint[:12]}); give every stage the same model directory"
        )
    if own.stages != other.stages:
        raise MismatchError(
            f"{who} belongs to a pipeline of {other.stages} stages, stage {own.index} to one of "
            f"{own.stages}; give every stage the same list of stages"
        )
    if own.kind != other.kind:
        raise MismatchError(
            f"{who} is of kind {pb.ModelKind.Name(other.kind)}, stage {own.index} of "
            f"{pb.ModelKind.Name(own.kind)}; run the same release everywhere"
        )
    if own.kv_block_tokens != other.kv_block_tokens:
        raise MismatchError(
            f"{who} has KV blocks of {other.kv_block_tokens} tokens, stage {own.index} of "
            f"{own.kv_block_tokens}; set the same kv-block-tokens everywhere"
        )
    for field, flag in (("compute_dtype", "dtype"), ("wire_dtype", "wire dtype")):
        mine, theirs = getattr(own, field), getattr(other, field)
        if mine != theirs:
            raise MismatchError(
                f"{who} has {flag} {tensor_pb2.Dtype.Name(theirs)}, stage {own.index} has "
                f"{tensor_pb2.Dtype.Name(mine)}; set the same {flag} everywhere"
            )


def _consecutive(before: pb.StageInfo, after: pb.StageInfo) -> None:
    if after.index != before.index + 1:
        raise MismatchError(
            f"stage {before.index} at {_word(before.address)} is followed by stage {after.index} "
            f"at {_word(after.address)}; check the order of the list of stages"
        )
    if after.first_layer != before.end_layer:
        raise MismatchError(
            f"stage {before.index} holds layers {_layers(before)} and stage {after.index} layers "
            f"{_layers(after)}: the ranges must follow one another without gap or overlap"
        )


def check_chain(chain: Sequence[pb.StageInfo], own: pb.StageInfo) -> None:
    """Checks a Hello's chain, from stage 0 to the sender, against this stage.

    At stage 0 the chain must be the whole pipeline. Raises `MismatchError`.
    """
    if not chain:
        raise MismatchError("a Hello without any stage in it")
    for other in chain:
        _same(own, other)
    first = chain[0]
    if first.index != 0 or first.first_layer != 0:
        raise MismatchError(
            f"the pipeline begins with stage {first.index}, layers {_layers(first)}, not with "
            "stage 0 at layer 0"
        )
    for before, after in itertools.pairwise(chain):
        _consecutive(before, after)
    last = chain[-1]
    if own.index == 0:
        if len(chain) != own.stages or last.end_layer != own.model_layers:
            raise MismatchError(
                f"the pipeline ends with stage {last.index}, layers {_layers(last)}, but "
                f"should have {own.stages} stages and {own.model_layers} layers"
            )
        if first != own:
            raise MismatchError(
                "the pipeline closed on another stage 0 than this one: two processes claim to "
                "be stage 0, or this one has just restarted"
            )
        return
    _consecutive(last, own)
    if own.index == own.stages - 1 and own.end_layer != own.model_layers:
        raise MismatchError(
            f"the last stage holds layers {_layers(own)} of a model of {own.model_layers}"
        )
