"""What is asked of a decoder, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt that is tokenised already: little-endian int32, one a token."""

    ids: bytes


Prompt: TypeAlias = "str | TokenPrompt | tokenizer_pb.ChatPrompt | tokenizer_pb.MediaPrompt"

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 500
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. None: as the model's makers advise, or else the neutral value,
    which for the temperature is 1."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """None: drawn."""
    logprobs: int | None = None
    """How many of the most probable tokens' are told beside the chosen one's; None: none."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    json_schema: str = ""

    def resolved(self, defaults: Mapping[str, float], seed: int) -> shard_pb.SamplingParams:
        """As sent to the shards; `seed` serves where there is none of the caller's."""

        def chosen(name: str, neutral: float) -> float:
            own = getattr(self, name)
            return float(defaults.get(name, neutral) if own is None else own)

        return shard_pb.SamplingParams(
            temperature=chosen("temperature", 1.0),
            top_k=int(chosen("top_k", 0)),
            top_p=chosen("top_p", 1.0),
            min_p=chosen("min_p", 0.0),
            repetition_penalty=chosen("repetition_penalty", 1.0),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed if self.seed is None else self.seed,
            logprobs=self.logprobs,
            logit_bias=self.logit_bias,
            json_schema=self.json_schema,
        )


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt to be continued."""

    prompt: Prompt
    sampling: Sampling = Sampling()
    max_tokens: int = 0
    """0: as many as the context has room for."""
    n: int = 1
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    """Whether the text goes on after the tokens that end one."""
    draft_tokens: int | None = None
    no_cache: bool = False
    features: shard_pb.Features | None = None
    """With a `MediaPrompt`: what the text is about."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's bytes and the natural logarithm of its probability."""

    piece: bytes
    logprob: float


@dataclass(slots=True)
class Token:
    """A token of the text, its log probability, and those of the most probable ones."""

    chosen: TokenLogprob
    top: list[TokenLogprob]
    offset: int
    """In code points of the text, to the token's first character."""


@dataclass(slots=True)
class TextNews:
    """What one of the n texts has gained; `finish_reason` with the last: "stop" or "length"."""

    index: int
    text: str
    finish_reason: str | None = None
    tokens: list[Token] = field(default_factory=list)


@dataclass(slots=True)
class Usage:
    """What a request cost, in tokens."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def add(self, other: Usage) -> None:
        """Counts another request's."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class News:
    """What a request's texts have gained at once; `usage` comes with the last."""

    texts: list[TextNews]
    usage: Usage | None = None
