"""Chunks of a stream as bytes. All of a chunk but its text is made once a request."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_json

from gateway.errors import GatewayError
from gateway.generation.request import TextNews, Token, TokenLogprob, Usage
from gateway.http.openai.errors import error_body

DONE = b"data: [DONE]\n\n"


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: %s\n\n" % to_json(data)


def error_event(error: GatewayError) -> bytes:
    """The event that ends a stream which fails after it has begun."""
    return event(error_body(error))


def usage_body(usage: Usage) -> dict[str, Any]:
    """The usage figures."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted_tokens,
            "rejected_prediction_tokens": max(0, usage.drafted_tokens - usage.accepted_tokens),
        },
    }


class Frames:
    """Chunks of one response."""

    def __init__(self, kind: str, head: dict[str, Any], with_usage: bool) -> None:
        """`kind`: "chat.completion.chunk" or "text_completion"; `head`: id, created, model, …"""
        self._chat = kind == "chat.completion.chunk"
        self._head = {"id": head["id"], "object": kind, **head}
        self._with_usage = with_usage
        # The object goes on after its last field.
        self._start = b"data: " + to_json(self._head)[:-1] + b',"choices":[{"index":'
        self._before = b',"delta":{"content":' if self._chat else b',"text":'
        self._after = (b"}" if self._chat else b"") + b',"logprobs":'
        self._end = b"}]" + (b',"usage":null' if with_usage else b"") + b"}\n\n"

    def begin(self, indices: range) -> bytes:
        """A chat's first chunks, which name the role."""
        frames = []
        for index in indices:
            choice = {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            frames.append(event(self._chunk([choice])))
        return b"".join(frames)

    def text(self, news: TextNews) -> bytes:
        """A text's news: a chunk, and in a chat another one with the reason of the end."""
        if not self._chat:
            logprobs = to_json(completion_logprobs(news.tokens)) if news.tokens else b"null"
            return self._frame(news, logprobs, news.finish_reason)
        frames = b""
        if news.text or news.tokens:
            logprobs = to_json(chat_logprobs(news.tokens)) if news.tokens else b"null"
            frames = self._frame(news, logprobs, None)
        if news.finish_reason is not None:
            choice = {
                "index": news.index,
                "delta": {},
                "logprobs": None,
                "finish_reason": news.finish_reason,
            }
            frames += event(self._chunk([choice]))
        return frames

    def _frame(self, news: TextNews, logprobs: bytes, reason: str | None) -> bytes:
        return b"".join(
            (
                self._start,
                b"%d" % news.index,
                self._before,
                to_json(news.text),
                self._after,
                logprobs,
                b',"finish_reason":',
                b"null" if reason is None else b'"%s"' % reason.encode(),
                self._end,
            )
        )

    def usage(self, usage: Usage) -> bytes:
        """The chunk with the usage figures."""
        return event({**self._head, "choices": [], "usage": usage_body(usage)})

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "choices": choices}
        if self._with_usage:
            chunk["usage"] = None
        return chunk


def chat_logprobs(tokens: list[Token]) -> dict[str, Any]:
    """Log probabilities as /v1/chat/completions has them."""
    return {
        "content": [
            {**_candidate(token.chosen), "top_logprobs": [_candidate(one) for one in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }


def _candidate(candidate: TokenLogprob) -> dict[str, Any]:
    return {
        "token": candidate.piece.decode("utf-8", "replace"),
        "logprob": candidate.logprob,
        "bytes": list(candidate.piece),
    }


def completion_logprobs(tokens: list[Token], offset: int = 0) -> dict[str, Any]:
    """Log probabilities as /v1/completions has them; offsets count from `offset`."""
    return {
        "tokens": [_spelt(token.chosen.piece) for token in tokens],
        "token_logprobs": [token.chosen.logprob for token in tokens],
        "top_logprobs": [{_spelt(one.piece): one.logprob for one in token.top} for token in tokens],
        "text_offset": [offset + token.offset for token in tokens],
    }


def _spelt(piece: bytes) -> str:
    """A token's text; parts of characters by their bytes, so that different ones differ."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
