"""What moves through the pipeline: sequences in batches, laid end to end."""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from miaotui.engine.decode.types import DecodeSlice, SampledTokens


class DropCode(enum.IntEnum):
    """Why a sequence left its batch; the values are gRPC's status codes."""

    CANCELLED = 1
    DEADLINE_EXCEEDED = 4
    INTERNAL = 13


@dataclass(slots=True)
class SequenceMeta:
    """What every stage knows of a sequence."""

    request_id: str
    sequence: int
    length: int
    """Tokens."""
    deadline: float = math.inf
    """On this machine's `time.monotonic()`, in seconds."""
    trace: Mapping[str, str] = field(default_factory=dict)
    """W3C trace context: `traceparent`, `tracestate`."""
    arrived: float = field(default_factory=time.monotonic)
    """When this stage got it (stage 0: when it was queued), on `time.monotonic()`."""
    decode: DecodeSlice | None = None
    """Decoders: where the tokens lie in the sequence and in the KV cache."""

    @property
    def prefill(self) -> bool:
        """Whether it holds a part of a prompt, and not just the next tokens of a text."""
        item = self.decode
        return item is not None and (item.begin is not None or self.length > item.samples)

    def expired(self) -> bool:
        """Whether nobody can use the result any more."""
        return self.deadline <= time.monotonic()


@dataclass(slots=True)
class Dropped:
    """A sequence that left its batch on the way."""

    request_id: str
    sequence: int
    code: DropCode
    message: str


@dataclass(slots=True)
class StageTiming:
    """Where a batch spent its time at one stage; seconds."""

    stage: int
    queue: float
    compute: float
    sequences: int
    tokens: int


@dataclass(slots=True)
class Batch:
    """Sequences laid end to end, without padding.

    `hidden` is `[tokens, hidden_size]` between stages and float32 `[tokens, 2]` (start and
    end logits) after the last, or `[sequences, hidden_size]` of a model that turns texts into
    vectors; None before stage 0 has computed and where no sequence is left.
    """

    batch_id: int
    sequences: list[SequenceMeta]
    hidden: torch.Tensor | None = None
    dropped: list[Dropped] = field(default_factory=list)
    timings: list[StageTiming] = field(default_factory=list)
    in_flight: int = 1
    """Batches in the pipeline when this one set out; co-located stages share cores by it."""
    released: list[int] = field(default_factory=list)
    """Decoders: ids of sequences that have ended; what is kept for sampling them may go."""
    sampled: list[SampledTokens] | None = None
    """Decoders, after the last stage: one entry a sequence with `samples`; `hidden` is None."""
    lane: int = 0
    """Stage 0's number of the lane that it takes."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, in the tensor's order."""
        return [meta.length for meta in self.sequences]

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(meta.length for meta in self.sequences)

    def drop(self, unwanted: Mapping[int, Dropped]) -> None:
        """Takes sequences (by their index in this batch) out, rows and all."""
        if not unwanted:
            return
        if self.hidden is not None:
            parts = self.hidden.split(self.lengths)
            kept = [part for index, part in enumerate(parts) if index not in unwanted]
            self.hidden = torch.cat(kept) if kept else None
        self.dropped.extend(unwanted.values())
        self.sequences = [m for i, m in enumerate(self.sequences) if i not in unwanted]

    def fail(self, code: DropCode, message: str) -> None:
        """Takes every sequence out for one reason."""
        self.drop(
            {
                index: Dropped(meta.request_id, meta.sequence, code, message)
                for index, meta in enumerate(self.sequences)
            }
        )
        self.hidden = None


class CancelledSet:
    """Ids of cancelled requests, the most recent ones: enough for all that is in flight."""

    def __init__(self, capacity: int = 16_384) -> None:
        self._ids: dict[str, None] = {}
        self._capacity = capacity

    def add(self, request_id: str) -> None:
        """Remembers an id; the oldest is forgotten where there are too many."""
        self._ids[request_id] = None
        if len(self._ids) > self._capacity:
            del self._ids[next(iter(self._ids))]

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._ids

    def __len__(self) -> int:
        return len(self._ids)


def drop_unwanted(batch: Batch, cancelled: CancelledSet) -> None:
    """Takes out of a batch what was cancelled or has passed its deadline."""
    unwanted: dict[int, Dropped] = {}
    now = time.monotonic()
    for index, meta in enumerate(batch.sequences):
        if meta.request_id in cancelled:
            unwanted[index] = Dropped(
                meta.request_id, meta.sequence, DropCode.CANCELLED, "cancelled by the caller"
            )
        elif meta.deadline <= now:
            unwanted[index] = Dropped(
                meta.request_id,
                meta.sequence,
                DropCode.DEADLINE_EXCEEDED,
                "the deadline passed before this was computed",
            )
    batch.drop(unwanted)
