"""The state of one text while it is written: what is still no text, what is held back."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence

from gateway.generation.request import TextNews, Token, TokenLogprob
from miaotui.text.stops import StopScanner
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb

# Tokens of the prompt before a text that continues it: what a token stands for may depend on
# its left neighbours (a leading space, above all).
CONTEXT_TOKENS = 5

_REASONS = {
    shard_pb.FINISH_REASON_STOP: "stop",
    shard_pb.FINISH_REASON_LENGTH: "length",
}


class GrowingText:
    """One of a request's n texts."""

    def __init__(
        self, index: int, context: bytes, stops: Sequence[str], stop_tokens: frozenset[bytes]
    ) -> None:
        """`context`: the prompt's last tokens, little-endian int32; `stop_tokens`: likewise."""
        self.index = index
        self.count = 0
        """Tokens written, the one that ended the text included."""
        self.done = False
        """Nothing more comes of it."""
        self._window = context
        self._read = len(context) // 4
        self._scanner = StopScanner(stops)
        self._stop_tokens = stop_tokens
        self._reason: str | None = None
        self._ids = bytearray()
        self._characters = 0
        # Tokens whose first character is not out yet.
        self._tokens: list[Token] = []
        self._spelt = 0
        self._speller = codecs.getincrementaldecoder("utf-8")("replace")
        self._places: list[shard_pb.PlaceLogprobs] = []

    @property
    def matched(self) -> bool:
        """Whether a stop string ended it."""
        return self._scanner.matched

    @property
    def ended(self) -> bool:
        """Whether its last token is here; `gain` may still be to come."""
        return self._reason is not None

    def take(self, delta: shard_pb.TextDelta) -> None:
        """Takes tokens from the shards; they become text in `gain`."""
        ids: bytes = delta.token_ids
        self._ids += ids
        places = list(delta.logprobs)
        self.count += len(ids) // 4
        self._reason = _REASONS.get(delta.finish_reason)
        if self._reason == "stop" and ids[-4:] in self._stop_tokens:
            ids, places = ids[:-4], places[: len(ids) // 4 - 1]
        self._window += ids
        self._places += places

    def resumed(self) -> shard_pb.ResumedText:
        """What another stage 0 must know to go on with it."""
        return shard_pb.ResumedText(token_ids=bytes(self._ids), ended=self.done or self.ended)

    def item(self) -> tokenizer_pb.DecodeItem:
        """What the tokenizer is asked."""
        return tokenizer_pb.DecodeItem(
            token_ids=self._window, read_offset=self._read, flush=self._reason is not None
        )

    def pieces(self) -> Iterable[int]:
        """Tokens whose bytes `gain` needs."""
        for place in self._places:
            yield place.chosen.token_id
            for candidate in place.top:
                yield candidate.token_id

    def gain(
        self, decoded: tokenizer_pb.DecodedItem, piece: Callable[[int], bytes]
    ) -> TextNews | None:
        """The news, now that the tokenizer has answered; None where there are none."""
        self._window = self._window[4 * decoded.prefix_offset :]
        self._read = decoded.read_offset - decoded.prefix_offset
        text = self._scanner.feed(decoded.text)
        reason = self._reason
        if self._scanner.matched:
            reason = "stop"
        elif reason is not None:
            text += self._scanner.flush()
        self.done = reason is not None
        self._characters += len(text)
        if self._places:
            self._spell(piece)
        tokens = self._tokens and self._released(everything=self.done)
        if not (text or tokens or reason):
            return None
        return TextNews(self.index, text, reason, tokens)

    def _spell(self, piece: Callable[[int], bytes]) -> None:
        for place in self._places:
            chosen, *top = (
                TokenLogprob(piece(candidate.token_id), candidate.logprob)
                for candidate in (place.chosen, *place.top)
            )
            self._tokens.append(Token(chosen, top, self._spelt))
            self._spelt += len(self._speller.decode(chosen.piece))
        self._places = []

    def _released(self, everything: bool) -> list[Token]:
        """Tokens of the text that is out; with a stop string go the tokens that follow it."""
        if everything and not self._scanner.matched:
            tokens, self._tokens = self._tokens, []
            return tokens
        out = [token for token in self._tokens if token.offset < self._characters]
        self._tokens = self._tokens[len(out) :]
        return out
