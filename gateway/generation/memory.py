"""The cache of generated texts: of requests that would give the same again."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from gateway.cache.stores import SealedStore
from gateway.generation.request import News, TextNews, Usage
from miaotui.v1 import shard_pb2 as shard_pb


@dataclass(frozen=True, slots=True)
class StoredText:
    """One of n texts."""

    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class StoredTexts:
    """All that a request has brought."""

    texts: list[StoredText]
    usage: Usage

    def replayed(self) -> News:
        """As news; all of the prompt was known, and none of the tokens guessed."""
        usage = Usage(
            prompt_tokens=self.usage.prompt_tokens,
            cached_tokens=self.usage.prompt_tokens,
            completion_tokens=self.usage.completion_tokens,
        )
        texts = [
            TextNews(index, stored.text, stored.finish_reason)
            for index, stored in enumerate(self.texts)
        ]
        return News(texts, usage)


_STORED: TypeAdapter[StoredTexts] = TypeAdapter(StoredTexts)


class Collector:
    """Joins news to what is kept."""

    def __init__(self, n: int) -> None:
        self._texts = [""] * n
        self._reasons: list[str | None] = [None] * n

    def take(self, news: News) -> None:
        """Takes news."""
        for text in news.texts:
            self._texts[text.index] += text.text
            self._reasons[text.index] = text.finish_reason or self._reasons[text.index]

    def result(self, usage: Usage) -> StoredTexts:
        """All of it, once every text has ended."""
        return StoredTexts(
            [
                StoredText(text, reason or "stop")
                for text, reason in zip(self._texts, self._reasons, strict=True)
            ],
            usage,
        )


class TextCache:
    """Generated texts by model, prompt and parameters."""

    def __init__(self, store: SealedStore) -> None:
        self._store = store

    def key(
        self, identity: str, request: shard_pb.GenerateRequest, stop: tuple[str, ...], chat: bool
    ) -> bytes:
        """The key of what `request` brings from the model and tokenizer of this identity."""
        what = shard_pb.GenerateRequest()
        what.CopyFrom(request)
        what.request_id = ""
        what.ClearField("draft_tokens")  # has no influence on the text
        return self._store.key(
            identity,
            what.SerializeToString(deterministic=True),
            json.dumps(stop),
            "chat" if chat else "text",
        )

    def salt(self) -> bytes:
        """What keeps the KV blocks of the current tenant's prompts apart at the shards."""
        return self._store.salt()

    async def get(self, key: bytes, n: int) -> StoredTexts | None:
        """What is kept under `key`."""
        payload = await self._store.read(key)
        if payload is None:
            return None
        try:
            stored = _STORED.validate_json(payload)
        except ValidationError:
            self._store.found(False)
            return None
        fits = len(stored.texts) == n
        self._store.found(fits)
        return stored if fits else None

    async def put(self, key: bytes, stored: StoredTexts) -> None:
        """Keeps it."""
        await self._store.write(key, _STORED.dump_json(stored))
