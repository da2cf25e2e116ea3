"""What the head, the stages and the sampler of a decoder say to each other."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]
SourceFeatures = npt.NDArray[np.float32]
"""What an encoder reads: the features of a sound, or a picture's pixels."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen.

    The logits pass, in this order, through bias, grammar, penalties, temperature, top_k,
    top_p and min_p. The defaults are greedy.
    """

    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """Only the most probable so many; 0: all."""
    top_p: float = 1.0
    """Only the most probable that sum up to this."""
    min_p: float = 0.0
    """Only those at least this many times as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Divides (where positive) or multiplies the logits of tokens in prompt and text (Keskar et
    al., CTRL, 2019)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the text."""
    frequency_penalty: float = 0.0
    """Subtracted so many times as a token is in the text."""
    seed: int = 0
    """The draw at a position depends on this and the position alone, so that a sequence that is
    computed again (preemption, replay) or verified ahead (speculation) gets the same tokens."""
    logprobs: int | None = None
    """Log probabilities of the chosen token and of this many of the most probable; None: none."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to tokens' logits."""
    json_schema: str = ""
    """The text must be JSON that fits this JSON schema; empty: free."""

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0

    @property
    def needs_prompt(self) -> bool:
        """Whether the sampler must know the prompt's tokens."""
        return self.repetition_penalty != 1.0

    @property
    def needs_history(self) -> bool:
        """Whether the sampler must know the tokens written so far."""
        return (
            self.needs_prompt
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or bool(self.json_schema)
        )


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """What the last stage must know to sample for a sequence."""

    sampling: SamplingParams
    prompt: TokenIds
    """int32 [tokens]; empty where `sampling.needs_prompt` is false."""
    written: TokenIds
    """int32 [tokens]: written before the sequence started again."""
    source: SourceFeatures | None = None
    """Encoder-decoder models, at stage 0 only: what the encoder reads."""


@dataclass(slots=True)
class DecodeSlice:
    """A sequence's share of one batch. Its length is the `SequenceMeta`'s."""

    sequence_id: int
    """Unique for the head's lifetime; a sequence that starts again gets a new one."""
    start: int
    """Position in the sequence of the first of its tokens in this batch; so many are cached."""
    blocks: TokenIds
    """int32: the KV block table, from the sequence's first token to this slice's last; before
    them, of an encoder-decoder model, the blocks of the encoder's rows."""
    samples: int
    """At so many of its last positions in this batch a token is sampled: 0 while more of the
    prompt follows, 1 in plain decoding, 1 + len(draft) when a draft is verified."""
    draft: TokenIds = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32: tokens guessed ahead, the slice's last tokens."""
    begin: SequenceStart | None = None
    """On a sequence's first slice only."""
    tokens: TokenIds = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32: encoder-decoder models' tokens, the draft's included, which a later stage embeds."""


@dataclass(frozen=True, slots=True)
class PlaceLogprobs:
    """Log probabilities (natural, before temperature and the filters) of one place."""

    chosen: tuple[int, float]
    top: tuple[tuple[int, float], ...] = ()
    """Best first."""


@dataclass(slots=True)
class SampledTokens:
    """What was sampled for a sequence in one batch."""

    sequence_id: int
    token_ids: TokenIds
    """int32: the draft's tokens that were right, then one more."""
    logprobs: list[PlaceLogprobs] = field(default_factory=list)
    """One a token where asked for, else empty."""
    complete: bool = False
    """Whether the grammar is complete: nothing may follow."""


class FinishReason(enum.IntEnum):
    """Why a text ended; the protocol's values."""

    STOP = 1
    """One of the request's stop tokens was written, or the grammar is complete."""
    LENGTH = 2
    """max_tokens were written, or the model's context is full."""


@dataclass(frozen=True, slots=True)
class WrittenText:
    """What was written of a text before its request was resumed."""

    token_ids: TokenIds
    """int32 [tokens]."""
    ended: bool = False
    """Nothing follows."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt to be continued, `n` times."""

    prompt: TokenIds
    """int32 [tokens], at least one."""
    sampling: SamplingParams = SamplingParams()
    max_tokens: int = 0
    """Most tokens a text; 0: as many as the context has room for."""
    stop_token_ids: frozenset[int] = frozenset()
    n: int = 1
    """How many texts; text i is sampled with seed + i."""
    draft_tokens: int | None = None
    """Most tokens guessed ahead a step; None: the head's default; 0: none."""
    cache_salt: bytes = b""
    """Only requests of equal salt share KV blocks."""
    source: SourceFeatures | None = None
    """float32: what the encoder of an encoder-decoder model reads; None for other models."""
    written: tuple[WrittenText, ...] = ()
    """Resumes a request: what was written before, one entry a text; not told again."""


@dataclass(slots=True)
class TextDelta:
    """New tokens of one of a request's texts."""

    index: int
    token_ids: TokenIds
    logprobs: list[PlaceLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class GenerationUsage:
    """What a request cost."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    queue_seconds: float = 0.0
    preemptions: int = 0


@dataclass(slots=True)
class GenerationUpdate:
    """News of a request: texts that grew; `usage` with the last."""

    deltas: list[TextDelta]
    usage: GenerationUsage | None = None
