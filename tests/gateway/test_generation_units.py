"""Parts of generation by themselves: stop strings, growing texts, passages, citations, prompts."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any

import numpy as np
import pytest

from gateway.errors import GatewayError
from gateway.generation.detokenizer import Detokenizer
from gateway.generation.merging import merged
from gateway.generation.prompts import CHINESE, ENGLISH, filled, question_prompt
from gateway.generation.request import News, TextNews, Usage
from gateway.generation.texts import GrowingText
from miaotui.text.citations import cite, common_runs, read_marks, split_passages
from miaotui.text.stops import StopScanner
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tokenizer_pb2 as tokenizer_pb


def scanned(text: str, stops: list[str], sizes: Any) -> tuple[str, bool, bool]:
    """(text let through, whether stopped, whether a held-back end ever could have been let out)"""
    scanner = StopScanner(stops)
    out, at, eager = "", 0, True
    while at < len(text) and not scanner.matched:
        size = sizes()
        out += scanner.feed(text[at : at + size])
        at += size
        held = text[:at][len(out) :]
        if held and not scanner.matched:
            eager &= any(stop.startswith(held) for stop in stops)
    return out + ("" if scanner.matched else scanner.flush()), scanner.matched, eager


def test_stop_scanner_against_the_plain_definition() -> None:
    """Whatever the pieces: the text up to the first stop string that is complete."""
    rng = random.Random(5)
    stopped = 0
    for _ in range(3000):
        text = "".join(rng.choice("ab北") for _ in range(rng.randint(1, 14)))
        stops = ["".join(rng.choice("ab北") for _ in range(rng.randint(1, 4))) for _ in range(3)]
        out, matched, eager = scanned(text, stops, lambda: 1)
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        if ends:
            stopped += 1
            first = min(ends)
            begins = [text.find(s) for s in stops if s in text[:first]]
            assert (out, matched) == (text[: min(begins)], True)
        else:
            assert (out, matched) == (text, False)
        assert eager
        whole, also, _ = scanned(text, stops, lambda: rng.randint(1, 6))
        assert also == matched
        if not matched:
            assert whole == text
    assert 500 < stopped < 2990


def test_a_growing_text_keeps_tokens_with_their_characters() -> None:
    text = GrowingText(0, b"", ["!!"], frozenset({(256).to_bytes(4, "little")}))

    def feed(*tokens: int, reason: Any = 0) -> TextNews | None:
        text.take(
            shard_pb.TextDelta(
                token_ids=np.array(tokens, "<i4").tobytes(),
                logprobs=[
                    shard_pb.PlaceLogprobs(chosen=shard_pb.TokenLogprob(token_id=t, logprob=-1))
                    for t in tokens
                ],
                finish_reason=reason,
            )
        )
        item = text.item()
        ids = np.frombuffer(item.token_ids, "<i4")
        before, after = (
            bytes(int(i) for i in run).decode("utf-8", "replace")
            for run in (ids[: item.read_offset], ids)
        )
        whole = item.flush or not after.endswith("\ufffd")
        return text.gain(
            tokenizer_pb.DecodedItem(
                text=after[len(before) :] if whole else "",
                prefix_offset=item.read_offset if whole else 0,
                read_offset=len(ids) if whole else item.read_offset,
            ),
            lambda token: bytes((token,)),
        )

    first, second, third = "北".encode()
    news = feed(65)
    assert news is not None
    assert (news.text, [t.offset for t in news.tokens]) == ("A", [0])
    assert feed(first) is None
    assert feed(second) is None
    news = feed(third)
    assert news is not None
    assert (news.text, [t.offset for t in news.tokens]) == ("北", [1, 1, 1])
    assert feed(33) is None  # held back: it may begin "!!"
    news = feed(66)
    assert news is not None
    assert (news.text, [t.offset for t in news.tokens]) == ("!B", [2, 3])
    news = feed(33, 33, 67)
    assert news is not None
    assert (news.text, news.tokens, news.finish_reason) == ("", [], "stop")
    assert text.done
    assert text.matched
    assert text.count == 9


async def test_detokenizer_asks_once_a_turn_and_one_call_at_a_time() -> None:
    calls: list[int] = []
    running = 0
    answer = asyncio.Event()

    async def decode(request: Any, /, **_: Any) -> tokenizer_pb.DecodeBatchResponse:
        nonlocal running
        running += 1
        assert running == 1
        calls.append(len(request.items))
        await answer.wait()
        running -= 1
        return tokenizer_pb.DecodeBatchResponse(
            items=[
                tokenizer_pb.DecodedItem(text=item.token_ids.decode()) for item in request.items
            ],
            pieces=[b"%d" % piece for piece in request.pieces],
        )

    detokenizer = Detokenizer(decode)

    async def ask(name: str) -> None:
        items = [tokenizer_pb.DecodeItem(token_ids=f"{name}{i}".encode()) for i in range(2)]
        decoded = await detokenizer.read(items, [len(name)])
        assert [item.text for item in decoded] == [f"{name}0", f"{name}1"]
        assert detokenizer.piece(len(name)) == b"%d" % len(name)

    async def turns() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    leaving = asyncio.create_task(ask("gone"))
    await turns()
    leaving.cancel()
    asking = [asyncio.create_task(ask("now")) for _ in range(10)]
    await turns()
    asking += [asyncio.create_task(ask("later")) for _ in range(5)]
    await turns()
    answer.set()
    await asyncio.gather(*asking)
    assert calls == [2, 30]
    await detokenizer.close()


async def test_merged_news() -> None:
    async def stream(count: int) -> Any:
        for number in range(count):
            await asyncio.sleep(0.001)
            yield News([TextNews(number % 2, str(number))])
        yield News([], Usage(prompt_tokens=1, completion_tokens=count))

    texts = [""] * 4
    last = None
    async for news in merged([stream(4), stream(7)], 2):
        assert last is None
        for text in news.texts:
            texts[text.index] += text.text
        last = news.usage
    assert texts == ["02", "13", "0246", "135"]
    assert last == Usage(prompt_tokens=2, completion_tokens=11)
    closed = asyncio.Event()

    async def failing() -> Any:
        yield News([TextNews(0, "x")])
        raise GatewayError("timeout", "Too late.")

    async def endless() -> Any:
        try:
            while True:
                await asyncio.sleep(0.01)
                yield News([TextNews(0, "y")])
        finally:
            closed.set()

    with pytest.raises(GatewayError, match="Too late"):
        async for _ in merged([endless(), failing()], 1):
            pass
    assert closed.is_set()


def sentences(text: str, **more: int) -> list[str]:
    ranges = split_passages(text, **more)
    assert all(b <= c for (_, b), (c, _) in itertools.pairwise(ranges))
    return [text[begin:end] for begin, end in ranges]


def test_passages_are_sentences() -> None:
    assert sentences(
        "He met Dr. Who at 3.5 p.m. in the U.S. capital. It rained!  Why?\nNo end"
    ) == [
        "He met Dr. Who at 3.5 p.m. in the U.S. capital.",
        "It rained!",
        "Why?",
        "No end",
    ]
    assert sentences("长江全长6300公里。“真长！”他说。在哪里？\n\n第二段") == [
        "长江全长6300公里。",
        "“真长！”",
        "他说。",
        "在哪里？",
        "第二段",
    ]
    assert sentences("  \n ") == []
    assert sentences("One. Two. Three. Four. Five.", most=2) == ["One. Two. Three.", "Four. Five."]


def test_marks_are_read_and_taken_out() -> None:
    assert read_marks("It is so [2]. And so [1, 3][9].", 3) == ("It is so. And so.", [1, 0, 2])
    assert read_marks("长江最长【2】［1、3］。", 3) == ("长江最长。", [1, 0, 2])
    assert read_marks("a[i] stays, as does [x] and []", 3) == ("a[i] stays, as does [x] and []", [])


def test_common_runs_are_whole_words_of_some_length() -> None:
    context = (
        "The Palace Museum in Beijing was founded in 1925. 长江发源于唐古拉山脉，全长约6300公里。"
    )

    def found(answer: str) -> list[str]:
        return [context[begin:end] for begin, end in common_runs(answer, context)]

    assert found("I think the Palace Museum in Beijing opened once.") == [
        "Palace Museum in Beijing"
    ]
    assert found("the museum was old") == []
    assert found("它发源于唐古拉山脉。") == ["发源于唐古拉山脉"]
    assert found("长江很长") == []
    twice = "alpha beta gamma delta. And again alpha beta gamma delta."
    assert common_runs("alpha beta gamma delta", twice, [(24, len(twice))]) == [(34, 56)]


def test_citations_from_marks_and_words() -> None:
    context = "The Yangtze is long. It rises in the Tanggula Mountains. It ends in Shanghai."
    passages = split_passages(context)
    plain, ranges = cite("It rises in the Tanggula Mountains and is long [1].", context, passages)
    assert plain == "It rises in the Tanggula Mountains and is long."
    assert [context[begin:end] for begin, end in ranges] == [
        "The Yangtze is long.",
        "It rises in the Tanggula Mountains",
    ]
    plain, ranges = cite("It ends in Shanghai [3][3].", context, passages)
    assert [context[begin:end] for begin, end in ranges] == ["It ends in Shanghai."]
    assert cite("Nobody knows.", context, passages) == ("Nobody knows.", [])


def test_prompts_are_in_the_questions_language() -> None:
    assert question_prompt("长江有多长?") is CHINESE
    assert question_prompt("How long is 长江? ") is CHINESE
    assert question_prompt("富士山の高さは？") is ENGLISH
    assert question_prompt("How long is it?") is ENGLISH
    text = filled(ENGLISH, "What is {passages}?", ["A {question}\n B.", "C."])
    assert "[1] A {question} B.\n[2] C." in text
    assert text.endswith("Question: What is {passages}?")
