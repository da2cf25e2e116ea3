"""What the tests with the official `openai` client send, and how they read streams."""

from __future__ import annotations

from typing import Any

MODEL = "fake-writer"
CHINESE = "长江全长6300公里😀，是亚洲第一长河。👩‍🚀"
USER: Any = [{"role": "user", "content": "Hello?"}]


async def streamed(stream: Any) -> tuple[list[str], list[str | None], list[Any]]:
    """The texts by choice, the reasons, and all chunks."""
    chunks = [chunk async for chunk in stream]
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            piece = choice.delta.content if hasattr(choice, "delta") else choice.text
            assert reasons.get(choice.index) is None, "text after the end"
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
            reasons[choice.index] = choice.finish_reason
    order = sorted(texts)
    return [texts[index] for index in order], [reasons[index] for index in order], chunks
