"""A request from its arrival to its last update."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from miaotui.engine.decode.sequence import Grown, State, Text, Work
from miaotui.engine.decode.speculation import Drafter
from miaotui.engine.decode.types import (
    FinishReason,
    GenerationUpdate,
    SampledTokens,
    TextDelta,
    TokenIds,
)

log = logging.getLogger(__name__)

Sink = Callable[[GenerationUpdate | Exception], None]
"""Takes a request's news on the event loop; after an update with `usage`, or an exception, no
more come."""

# Room for so many tokens is made with the prompt's; more when they are written.
_SPARE_TOKENS = 64


class Holder(Protocol):
    """The head that a request is at."""

    def abandon(self, work: OpenRequest) -> None:
        """Ends a request that nobody waits for any more."""


@dataclass(eq=False, slots=True, kw_only=True)
class OpenRequest(Work):
    """Collects what is new for a request until it is delivered."""

    sink: Sink
    head: Holder | None = None
    """Where it is now; lanes that break hand their requests to others."""
    texts: list[Text] = field(default_factory=list)
    left: int = 0
    """Texts that go on."""
    error: Exception | None = None
    """Why it failed."""
    timer: asyncio.TimerHandle | None = None
    """Of its deadline."""
    muted: bool = False
    """Whether nobody listens any more."""
    _news: dict[int, TextDelta] = field(default_factory=dict)

    def add_texts(self, first_order: int, draft_tokens: int) -> list[Text]:
        """Creates its texts; the first gets `first_order`, the others those after it."""
        request = self.request
        drafts = draft_tokens if request.draft_tokens is None else request.draft_tokens
        for index in range(request.n):
            sampling = request.sampling
            if index:
                sampling = replace(sampling, seed=(sampling.seed + index) % 2**64)
            self.texts.append(
                Text(
                    work=self,
                    index=index,
                    order=first_order + index,
                    sampling=sampling,
                    tokens=Grown(
                        request.prompt, min(request.max_tokens or _SPARE_TOKENS, _SPARE_TOKENS)
                    ),
                    prompt_length=len(request.prompt),
                    drafter=Drafter(drafts, len(request.prompt)),
                )
            )
        self.left = request.n
        for text, written in zip(self.texts, request.written, strict=False):
            text.tokens.extend(written.token_ids)
            if written.ended:
                text.state = State.DONE
                self.left -= 1
        return self.texts

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        if self.head is not None:
            self.head.abandon(self)

    def bound(self, context: int, capacity: int | None) -> None:
        """Sets the length at which its texts end."""
        request = self.request
        limit = context
        if request.max_tokens:
            limit = min(limit, len(request.prompt) + request.max_tokens)
        if capacity is not None:
            # The last token's keys and values are not needed.
            limit = min(limit, capacity + 1)
        for text in self.texts:
            text.limit = limit

    def note(
        self, text: Text, sampled: SampledTokens, tokens: TokenIds, reason: FinishReason | None
    ) -> None:
        """Keeps a text's new tokens (the first of those sampled) until they are delivered."""
        logprobs = sampled.logprobs[: len(tokens)]
        news = self._news.get(text.index)
        if news is None:
            self._news[text.index] = TextDelta(text.index, tokens, logprobs, reason)
            return
        news.token_ids = np.concatenate((news.token_ids, tokens))
        news.logprobs = news.logprobs + logprobs
        news.finish_reason = reason

    def deliver(self) -> None:
        """Tells the sink what is new."""
        deltas, self._news = list(self._news.values()), {}
        ended = not self.left and self.error is None
        try:
            if (deltas or ended) and not self.muted:
                self.sink(GenerationUpdate(deltas, self.usage if ended else None))
            if self.error is not None and not self.muted:
                self.sink(self.error)
        except Exception:
            # One caller's defect is not to stop the others' news.
            log.exception("request %s could not be told its news", self.key)


def ending(text: Text, sampled: SampledTokens) -> tuple[TokenIds, FinishReason | None]:
    """Those of the sampled tokens that count, and whether the text ends with them."""
    tokens = sampled.token_ids
    room = text.limit - text.length
    stops = text.work.request.stop_token_ids
    if stops:
        for index, token in enumerate(tokens[:room].tolist()):
            if token in stops:
                return tokens[: index + 1], FinishReason.STOP
    if sampled.complete and len(tokens) <= room:
        return tokens, FinishReason.STOP
    if len(tokens) >= room:
        return tokens[:room], FinishReason.LENGTH
    return tokens, None
