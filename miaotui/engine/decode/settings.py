"""Bounds of generation."""

from __future__ import annotations

from dataclasses import dataclass

from miaotui.engine.decode.speculation import MAX_VOCABULARY


@dataclass(frozen=True)
class GenerationSettings:
    """Bounds of the head. Times in seconds."""

    stages: int
    """Of the pipeline."""
    vocabulary: int
    """Token ids are below this."""
    context: int
    """Most tokens of prompt and text together that the model can take."""
    max_in_flight: int
    """Batches in the pipeline at once; stages + 1 keeps every stage busy."""
    micro_batches: int = 0
    """Over so many batches the texts that are being written are spread; 0: `stages`, so that no
    stage waits for another. Stages that share one machine's cores do better with fewer: each
    batch reads all weights."""
    batch_tokens: int = 1024
    """Most tokens in a batch."""
    chunk_tokens: int = 256
    """Of these, most that belong to prompts while texts are being written: it bounds how much
    later their next tokens come."""
    max_running: int = 256
    """Most texts that are computed at once."""
    queue_sequences: int = 2048
    """Most texts that wait."""
    queue_tokens: int = 1_048_576
    """Most tokens that wait."""
    draft_tokens: int = 8
    """Most tokens guessed ahead a step, where a request does not say; 0: none."""
    draft_batch_tokens: int = 32
    """No tokens are guessed ahead beyond so many of a batch: about as many as cost no more time
    than one, because reading the weights takes longer."""
    prefix_cache: bool = True
    """Whether texts that begin alike share KV blocks."""
    source_shape: tuple[int, ...] = ()
    """Encoder-decoder models: of a request's features; empty: the model takes none."""
    source_rows: int = 0
    """Encoder-decoder models: rows that the encoder makes of them. A text's first slice carries
    them, and their keys and values lie in its first KV blocks."""
    news_seconds: float = 0.0
    """Tokens are told at most this often, but for a text's first and its end: each telling costs
    a message at every hop, and so time of the cores that compute. 0: every step."""
    grace: float = 15.0
    """So long requests wait for a broken pipeline to come back."""
    max_attempts: int = 3
    """How often a text is started before its request fails."""

    def __post_init__(self) -> None:
        smallest = min(
            self.stages,
            self.vocabulary,
            self.context - 1,
            self.max_in_flight,
            self.batch_tokens,
            self.chunk_tokens,
            self.max_running,
            self.queue_sequences,
            self.queue_tokens,
            self.max_attempts,
        )
        if smallest < 1 or min(self.micro_batches, self.draft_tokens, self.news_seconds) < 0:
            raise ValueError(f"a bound is too small: {self}")
        if bool(self.source_shape) != (self.source_rows > 0):
            raise ValueError("source_shape and source_rows are given together or not at all")
        if self.vocabulary > MAX_VOCABULARY:
            raise ValueError(f"a vocabulary of {self.vocabulary} exceeds {MAX_VOCABULARY}")

    @property
    def groups(self) -> int:
        """Over so many batches the texts that are being written are spread."""
        return min(self.micro_batches or self.stages, self.max_in_flight)
