"""From logits back to characters of the caller's passage."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from gateway.cache.stores import StoredAnswer, StoredSpan
from gateway.schema import QaRequest
from miaotui.engine.spans import WindowLogits
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


def read_spans(
    windows: tokenizer_pb.EncodeResponse,
    passage: tokenizer_pb.TokenizedText,
    logits: shard_pb.InferResponse,
    request: QaRequest,
) -> StoredAnswer:
    """The best spans as characters. Raises `ValueError` for messages that do not fit."""
    reading = read_token_spans(
        [
            WindowLogits(
                start=np.frombuffer(window_logits.start, "<f4"),
                end=np.frombuffer(window_logits.end, "<f4"),
                passage_position=window.passage_position,
                passage_first=window.passage_first,
                passage_tokens=window.passage_tokens,
            )
            for window, window_logits in zip(windows.windows, logits.logits, strict=True)
        ],
        top_k=request.top_k + _SPARE_SPANS,
        max_answer_length=request.max_answer_length,
        no_answer_threshold=request.no_answer_threshold,
    )
    tokens = TokenizedText(
        input_ids=np.frombuffer(passage.input_ids, "<i4"),
        starts=np.frombuffer(passage.starts, "<i4"),
        ends=np.frombuffer(passage.ends, "<i4"),
        characters=passage.characters,
        fingerprint=passage.fingerprint,
    )
    tokens.check("passage")
    if tokens.characters != len(request.context):
        raise ValueError("the tokenised passage is not of the passage asked about")
    starts, ends = character_spans(
        tokens,
        np.array([span.first for span in reading.spans], np.int32),
        np.array([span.last for span in reading.spans], np.int32),
    )
    found: dict[tuple[int, int], StoredSpan] = {}
    for span, start, end in zip(reading.spans, starts.tolist(), ends.tolist(), strict=True):
        if start < end:
            found.setdefault((start, end), StoredSpan(start, end, span.score, span.logit))
    spans = list(found.values())[: request.top_k]
    if not reading.answerable and request.top_k == 1:
        spans = []
    return StoredAnswer(reading.answerable, reading.no_answer_score, spans)
