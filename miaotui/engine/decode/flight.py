"""What a batch carries, and whether what comes back fits it."""

from __future__ import annotations

import math
import time

import numpy as np

from miaotui.engine.batch import Batch, SequenceMeta
from miaotui.engine.decode.scheduler import Plan, Slice
from miaotui.engine.decode.types import DecodeSlice, SampledTokens, TokenIds


def load(batch_id: int, plan: Plan, block_tokens: int) -> tuple[Batch, TokenIds]:
    """A plan as a batch, and the tokens of its slices laid end to end, int32 [tokens]."""
    input_ids = np.empty(plan.tokens, np.int32)
    now = time.monotonic()
    begin = 0
    metas: list[SequenceMeta] = []
    for item in plan.slices:
        text = item.text
        end = begin + item.length
        known = end - len(item.draft)
        stop = item.start + item.length
        input_ids[begin:known] = text.tokens.view(item.start, stop - len(item.draft))
        input_ids[known:end] = item.draft
        begin = end
        metas.append(
            SequenceMeta(
                request_id=text.work.key,
                sequence=text.index,
                length=item.length,
                # Only stage 0 takes a sequence out: the others' KV blocks depend on it.
                deadline=math.inf,
                trace=text.work.trace,
                arrived=text.ready_since,
                decode=DecodeSlice(
                    sequence_id=item.sequence_id,
                    start=item.start,
                    blocks=text.table.view(0, -(-stop // block_tokens)),
                    samples=item.samples,
                    draft=item.draft,
                    begin=text.start() if item.first else None,
                ),
            )
        )
        text.ready_since = now
    return Batch(batch_id, metas), input_ids


def fits(item: Slice, sampled: SampledTokens | None) -> bool:
    """Whether this is what the last stage may return for a slice."""
    if item.start != item.text.computed:
        return False  # Something before it is missing.
    if not item.samples:
        return True
    if sampled is None or not 1 <= len(sampled.token_ids) <= item.samples:
        return False
    accepted = len(sampled.token_ids) - 1
    return not accepted or np.array_equal(sampled.token_ids[:accepted], item.draft[:accepted])
