"""From logits back to characters of the caller's passage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gateway.cache.stores import StoredAnswer, StoredSpan
from gateway.schema import QaRequest
from miaotui.engine.spans import Span, WindowLogits
from miaotui.engine.spans import read_spans as read_token_spans
from miaotui.text.tokens import TokenizedText, character_spans
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb

# Token spans beside those asked for, in place of any that stand for the same characters
# (pieces of one character) or for none (white space).
_SPARE_SPANS = 4


class SpanReader(Protocol):
    """Reads the best spans from a request's logits."""

    def __call__(
        self,
        windows: tokenizer_pb.EncodeResponse,
        passage: tokenizer_pb.TokenizedText,
        logits: shard_pb.InferResponse,
        request: QaRequest,
    ) -> StoredAnswer:
        """The answer; raises `ValueError` where the messages do not fit each other."""


def window_logits(
    windows: tokenizer_pb.EncodeResponse, logits: shard_pb.InferResponse
) -> list[WindowLogits]:
    """Each window's logits; views of the messages. Raises `ValueError` where they do not fit."""
    return [
        WindowLogits(
            start=np.frombuffer(of_window.start, "<f4"),
            end=np.frombuffer(of_window.end, "<f4"),
            passage_position=window.passage_position,
            passage_first=window.passage_first,
            passage_tokens=window.passage_tokens,
        )
        for window, of_window in zip(windows.windows, logits.logits, strict=True)
    ]


def text_tokens(message: tokenizer_pb.TokenizedText) -> TokenizedText:
    """A tokenised text; views of the message. Raises `ValueError` where it contradicts itself."""
    tokens = TokenizedText(
        input_ids=np.frombuffer(message.input_ids, "<i4"),
        starts=np.frombuffer(message.starts, "<i4"),
        ends=np.frombuffer(message.ends, "<i4"),
        characters=message.characters,
        fingerprint=message.fingerprint,
    )
    tokens.check("tokenized")
    return tokens


def places(tokens: TokenizedText, spans: Sequence[Span]) -> dict[tuple[int, int], int]:
    """Characters [start, end) to the first span that stands for them, in the spans' order.

    Spans that stand for no characters are left out.
    """
    starts, ends = character_spans(
        tokens,
        np.array([span.first for span in spans], np.int32),
        np.array([span.last for span in spans], np.int32),
    )
    found: dict[tuple[int, int], int] = {}
    for index, place in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        if place[0] < place[1]:
            found.setdefault(place, index)
    return found


def read_spans(
    windows: tokenizer_pb.EncodeResponse,
    passage: tokenizer_pb.TokenizedText,
    logits: shard_pb.InferResponse,
    request: QaRequest,
) -> StoredAnswer:
    """The best spans as characters. Raises `ValueError` for messages that do not fit."""
    reading = read_token_spans(
        window_logits(windows, logits),
        top_k=request.top_k + _SPARE_SPANS,
        max_answer_length=request.max_answer_length,
        no_answer_threshold=request.no_answer_threshold,
    )
    tokens = text_tokens(passage)
    if tokens.characters != len(request.context):
        raise ValueError("the tokenised passage is not of the passage asked about")
    spans = [
        StoredSpan(start, end, reading.spans[index].score, reading.spans[index].logit)
        for (start, end), index in places(tokens, reading.spans).items()
    ][: request.top_k]
    if not reading.answerable and request.top_k == 1:
        spans = []
    return StoredAnswer(
        reading.answerable, reading.no_answer_score, spans, round(windows.unknown_share, 4)
    )
