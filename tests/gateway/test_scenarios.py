"""Ready prompts: what the model is told, in the caller's language."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.generation.scenarios import SCENARIOS
from miaotui.client import AsyncClient
from tests.gateway.conftest import Gateway
from tests.gateway.fakes import Fakes
from tests.gateway.test_contract import validator

ENGLISH = "The treaty was signed in Münster. {to} stays as it is."
CHINESE = "长江全长约6300公里。"
TURNS: Any = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": ENGLISH},
]


async def told(gateway: Gateway, fakes: Fakes, messages: Any, **options: Any) -> list[str]:
    """The messages that the model's template gets."""
    fakes.generator_tokenizer.asked = []
    async with (
        AsyncClient(gateway.url) as client,
        await client.chat(messages, temperature=0, **options) as stream,
    ):
        assert "".join([piece async for piece in stream]) == "Hello, world."
    (asked,) = fakes.generator_tokenizer.asked
    return [message.content for message in asked.chat.messages]


async def test_the_instruction_precedes_the_last_message(
    writer_gateway: Gateway, fakes: Fakes
) -> None:
    for name in ("answer", "summarise", "write"):
        said = await told(writer_gateway, fakes, TURNS, scenario=name)
        instruction = SCENARIOS[name].instruction["en"]
        assert said == ["Hi.", "Hello.", f"{instruction}\n\n{ENGLISH}"]


async def test_a_chats_instruction_precedes_its_first_message(
    writer_gateway: Gateway, fakes: Fakes
) -> None:
    said = await told(writer_gateway, fakes, TURNS, scenario="chat")
    assert said == [f"{SCENARIOS['chat'].instruction['en']}\n\nHi.", "Hello.", ENGLISH]


@pytest.mark.parametrize(
    ("text", "to", "beginning"),
    [
        (ENGLISH, None, "Translate the text below into Chinese. "),
        (ENGLISH, "fr", "Translate the text below into French. "),
        (ENGLISH, "Klingon", "Translate the text below into Klingon. "),
        (CHINESE, None, "把下面的文字翻译成英语。"),
        (CHINESE, "JA", "把下面的文字翻译成日语。"),
        ("東京はどこですか", "zh", "Translate the text below into Chinese. "),
    ],
)
async def test_translations(
    text: str, to: str | None, beginning: str, writer_gateway: Gateway, fakes: Fakes
) -> None:
    options = {} if to is None else {"to": to}
    messages = [{"role": "user", "content": text}]
    (said,) = await told(writer_gateway, fakes, messages, scenario="translate", **options)
    assert said.startswith(beginning)
    assert said.endswith(f"\n\n{text}")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"scenario": "rap"}, "scenario"),
        ({"to": "fr"}, "to"),
        ({"scenario": "summarise", "to": "fr"}, "to"),
        ({"scenario": "translate", "to": ""}, "to"),
        ({"scenario": "write", "messages": [{"role": "system", "content": "x"}]}, "scenario"),
    ],
)
async def test_what_is_refused(body: Any, field: str, writer_gateway: Gateway) -> None:
    whole = {"messages": TURNS, **body}
    response = await writer_gateway.http.post("/v1/chat/completions", json=whole)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


async def test_the_list(writer_gateway: Gateway) -> None:
    listed = (await writer_gateway.http.get("/v1/scenarios")).json()
    document = (await writer_gateway.http.get("/openapi.json")).json()
    validator(document, "ScenarioList").validate(listed)
    assert [one["name"] for one in listed["scenarios"]] == list(SCENARIOS)
    assert all(set(one["instruction"]) == {"en", "zh"} for one in listed["scenarios"])
