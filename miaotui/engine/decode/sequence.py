"""A text that is being written, and the request that it belongs to."""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from miaotui.engine.decode.blocks import BlockHasher
from miaotui.engine.decode.speculation import Drafter, PromptIndex
from miaotui.engine.decode.types import (
    GenerationRequest,
    GenerationUsage,
    SamplingParams,
    SequenceStart,
    TokenIds,
)

NO_TOKENS: TokenIds = np.zeros(0, np.int32)
NO_TOKENS.flags.writeable = False


class State(enum.Enum):
    """What a text is doing."""

    WAITING = enum.auto()
    """For room; it holds no KV blocks."""
    PREFILL = enum.auto()
    """Some of its known tokens have not been sent to the pipeline yet."""
    FLYING = enum.auto()
    """All of them have; the next token is on its way."""
    READY = enum.auto()
    """Its newest token may be sent."""
    DONE = enum.auto()
    """It ended, or nobody waits for it any more."""


class Grown:
    """An int32 array that grows at its end; views of what is there stay valid and unchanged."""

    __slots__ = ("_data", "size")

    def __init__(self, data: TokenIds, spare: int) -> None:
        self.size = len(data)
        self._data = np.empty(self.size + spare, np.int32)
        self._data[: self.size] = data

    def view(self, begin: int, end: int) -> TokenIds:
        """The elements from `begin` to before `end`."""
        return self._data[begin:end]

    def extend(self, data: TokenIds | list[int]) -> None:
        """Appends."""
        end = self.size + len(data)
        if end > len(self._data):
            grown = np.empty(2 * end, np.int32)
            grown[: self.size] = self._data[: self.size]
            self._data = grown
        self._data[self.size : end] = data
        self.size = end


@dataclass(eq=False, slots=True)
class Work:
    """What the scheduler knows of a request."""

    key: str
    """Unique for the head's lifetime."""
    request: GenerationRequest
    trace: Mapping[str, str]
    arrived: float
    """On `time.monotonic()`."""
    usage: GenerationUsage
    started: bool = False
    """Whether any of it has been sent."""
    prompt_digests: list[bytes] = field(default_factory=list)
    """Of the prompt's full blocks, as far as they have been computed."""
    _prompt_index: PromptIndex | None = None

    @property
    def prompt_index(self) -> PromptIndex:
        """For drafts; made when the first is wanted."""
        if self._prompt_index is None:
            self._prompt_index = PromptIndex(self.request.prompt)
        return self._prompt_index


@dataclass(eq=False, slots=True)
class Text:
    """One of a request's texts.

    In the pipeline it is a sequence with an id of its own; when it has to start again it gets
    another, and what still comes back under the old one is void.
    """

    work: Work
    index: int
    order: int
    """Of arrival, over all texts."""
    sampling: SamplingParams
    tokens: Grown
    """Prompt and what was written so far."""
    prompt_length: int
    drafter: Drafter
    limit: int = 0
    """It ends when it has so many tokens, the prompt's included."""
    state: State = State.WAITING
    sequence_id: int = 0
    """0 where nothing of it has been sent since it last started."""
    sent: int = 0
    """So many of its tokens have been sent to the pipeline, or were shared."""
    computed: int = 0
    """The keys and values of so many are known to be there."""
    table: Grown = field(default_factory=lambda: Grown(NO_TOKENS, 0))
    """Its KV blocks."""
    published: int = 0
    """So many of its blocks others may share."""
    digests: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they have been computed."""
    attempts: int = 0
    """How often it had to start again because something broke."""
    ready_since: float = field(default_factory=time.monotonic)
    """When it was queued, or its newest token arrived, on `time.monotonic()`."""

    @property
    def length(self) -> int:
        """Tokens of prompt and text."""
        return self.tokens.size

    @property
    def left(self) -> int:
        """Tokens that have yet to be sent to the pipeline."""
        return self.tokens.size - self.sent

    def draft(self) -> TokenIds:
        """What may follow, int32; often nothing."""
        # One token comes even if none of them is right.
        room = self.limit - self.length - 1
        if not self.drafter.most or room < 1:
            return NO_TOKENS
        guess = self.drafter.draft(self.tokens.view(0, self.length), self.work.prompt_index, room)
        return NO_TOKENS if guess is None else guess

    def start(self) -> SequenceStart:
        """What the last stage must know of it."""
        return SequenceStart(
            sampling=self.sampling,
            prompt=self.tokens.view(0, self.prompt_length)
            if self.sampling.needs_prompt
            else NO_TOKENS,
            written=self.tokens.view(self.prompt_length, self.length),
            source=self.work.request.source,
        )

    def stop(self, state: State) -> None:
        """Takes it out of the pipeline; its blocks must have been given back."""
        self.state = state
        self.sequence_id = 0
        self.sent = self.computed = self.published = 0
        # A new one: batches in flight still refer to the old.
        self.table = Grown(NO_TOKENS, 0)

    def extend_digests(self, hasher: BlockHasher, block_tokens: int) -> None:
        """Brings `digests` up to its last full block; the prompt's are shared among texts."""
        if not self.digests and self.work.prompt_digests:
            self.digests.extend(self.work.prompt_digests)
        full = self.length // block_tokens
        if full <= len(self.digests):
            return
        parent = self.digests[-1] if self.digests else self.work.request.cache_salt
        for begin in range(len(self.digests) * block_tokens, full * block_tokens, block_tokens):
            block = self.tokens.view(begin, begin + block_tokens)
            parent = hasher.digest(parent, block.tobytes())
            self.digests.append(parent)
        if not self.work.prompt_digests:
            self.work.prompt_digests = self.digests[: self.prompt_length // block_tokens]
