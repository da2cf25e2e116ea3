"""The tokenizer service, asked over the network."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import numpy as np
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from miaotui.models.fingerprint import model_fingerprint, tokenizer_fingerprint
from miaotui.text.cleaning import TextOptions
from miaotui.text.normalization import Normalization
from miaotui.text.tokenizer import TextTokenizer, load_tokenizer
from miaotui.v1 import shard_pb2 as shard_pb
from miaotui.v1 import tokenizer_pb2 as pb
from tests.checkpoints import EXAMPLES
from tests.processes import clean_environment
from tests.tokenizer.conftest import Service

if TYPE_CHECKING:  # the generated module itself has no such class
    from miaotui.v1.tokenizer_pb2_grpc import TokenizerServiceAsyncStub as Stub

SECRET = "xyzzysecret"
UNKNOWN_FORM: Any = {"normalization": 9}
LONG = "ab 北 " * 80_000


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> TextTokenizer:
    """The same tokenizer in this process."""
    return load_tokenizer(model)


def expected(
    tokenizer: TextTokenizer, question: str, text: str, options: TextOptions, **lengths: int
) -> pb.EncodeResponse:
    """What the service must answer, by `miaotui.text`."""
    passage = tokenizer.tokenize(text, options)
    asked = tokenizer.tokenize(question, options)
    windows = tokenizer.windows(asked, passage, **lengths)
    response = pb.EncodeResponse(
        unknown_share=tokenizer.unknown_share(asked, passage),
        passage=pb.TokenizedText(
            input_ids=passage.input_ids.tobytes(),
            starts=passage.starts.tobytes(),
            ends=passage.ends.tobytes(),
            characters=len(text),
            fingerprint=tokenizer.text_fingerprint(options),
        ),
    )
    for window in windows:
        assert window.token_type_ids is not None
        response.windows.add(
            input_ids=window.input_ids.tobytes(),
            token_type_ids=window.token_type_ids.tobytes(),
            passage_position=window.passage_position,
            passage_first=window.passage_first,
            passage_tokens=window.passage_tokens,
        )
    return response


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    """Status and message of a call that must fail."""
    with pytest.raises(aio.AioRpcError) as info:
        await call
    return info.value.code(), info.value.details() or ""


async def test_health_and_reflection(channel: aio.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    for name in ("", "miaotui.v1.TokenizerService"):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
    stream = reflection.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    names = [s.name async for r in stream for s in r.list_services_response.service]
    assert "miaotui.v1.TokenizerService" in names


async def test_describe(stub: Stub, model: Path, tokenizer: TextTokenizer) -> None:
    description = await stub.Describe(pb.TokenizerServiceDescribeRequest())
    assert description == pb.TokenizerServiceDescribeResponse(
        model_fingerprint=model_fingerprint(model),
        tokenizer_fingerprint=tokenizer_fingerprint(model),
        vocab_size=tokenizer.vocab_size,
        max_length=384,
        stride=128,
        kind=shard_pb.MODEL_KIND_EXTRACTIVE,
        scripts=tokenizer.script_pieces(),
    )
    assert description.scripts["Latin"] > 50
    assert description.scripts["Cyrillic"] == 0


async def test_a_window_is_told_how_it_is_made_up(stub: Stub, tokenizer: TextTokenizer) -> None:
    question, text = EXAMPLES[3]
    reply = await stub.Encode(pb.EncodeRequest(question=question, text=text, explain=True))
    layout, window = reply.layout, reply.windows[0]
    asked = tokenizer.tokenize(question)
    assert layout.question.input_ids == asked.input_ids.tobytes()
    assert layout.question.starts == asked.starts.tobytes()
    first, past = layout.question_position, layout.question_position + len(asked)
    ids = np.frombuffer(window.input_ids, "<i4")
    assert ids[first:past].tolist() == asked.input_ids.tolist()
    end = window.passage_position + window.passage_tokens
    special = [*ids[:first], *ids[past : window.passage_position], *ids[end:]]
    assert [layout.special_tokens[token] for token in special] == ["[CLS]", "[SEP]", "[SEP]"]
    assert not (await stub.Encode(pb.EncodeRequest(question="q", text="t"))).HasField("layout")


async def test_unknown_tokens_are_counted(stub: Stub) -> None:
    reply = await stub.Encode(pb.EncodeRequest(question="where", text="is 𐍈 it 𐍈"))
    assert reply.unknown_share == pytest.approx(2 / (5 + 4), abs=0.2)
    assert reply.unknown_share > 0
    assert (await stub.Encode(pb.EncodeRequest(question="a", text="b"))).unknown_share == 0


async def test_many_at_once_of_mixed_lengths(stub: Stub, tokenizer: TextTokenizer) -> None:
    """Short texts inline, long ones on threads: each gets its own answer."""
    pairs = [(q, p * repeat) for repeat in (1, 3, 40) for q, p in EXAMPLES]
    replies = await asyncio.gather(
        *(stub.Encode(pb.EncodeRequest(question=q, text=p)) for q, p in pairs)
    )
    for (question, passage), reply in zip(pairs, replies, strict=True):
        assert reply == expected(tokenizer, question, passage, TextOptions())


async def test_options_and_lengths(stub: Stub, tokenizer: TextTokenizer) -> None:
    text = "<p>Cafe\u0301 &amp; ﬁne</p>\0" * 30
    forms = {
        pb.NORMALIZATION_UNSPECIFIED: Normalization.NFC,
        pb.NORMALIZATION_NONE: Normalization.NONE,
        pb.NORMALIZATION_NFC: Normalization.NFC,
        pb.NORMALIZATION_NFKC: Normalization.NFKC,
    }
    for form, normalization in forms.items():
        for markup in (False, True):
            reply = await stub.Encode(
                pb.EncodeRequest(
                    question="What?",
                    text=text,
                    options=pb.TextOptions(normalization=form, strip_markup=markup),
                    max_length=50,
                    stride=0,
                )
            )
            options = TextOptions(normalization, markup)
            assert reply == expected(tokenizer, "What?", text, options, max_length=50, stride=0)


async def test_a_tokenised_passage_can_be_sent_again(stub: Stub) -> None:
    question, text = EXAMPLES[3]
    first = await stub.Encode(pb.EncodeRequest(question=question, text=text * 20))
    again = await stub.Encode(pb.EncodeRequest(question=question, tokenized=first.passage))
    assert again.windows == first.windows
    assert not again.HasField("passage")
    status, message = await refusal(
        stub.Encode(
            pb.EncodeRequest(
                question=question,
                tokenized=first.passage,
                options=pb.TextOptions(strip_markup=True),
            )
        )
    )
    assert status is grpc.StatusCode.FAILED_PRECONDITION
    assert message.startswith("tokenized: ")


async def test_spans_come_back_as_sent(stub: Stub) -> None:
    text = "The <b>Eif\u00adfel</b> Tower, Cafe\u0301 😀 北京。"
    options = pb.TextOptions(strip_markup=True)
    passage = (
        await stub.Encode(pb.EncodeRequest(question="?", text=text, options=options))
    ).passage
    starts = np.frombuffer(passage.starts, "<i4").tolist()
    ends = np.frombuffer(passage.ends, "<i4").tolist()
    answers = ["Eif\u00adfel", "Cafe\u0301", "😀", "北京", "Eif\u00adfel</b> Tower"]
    spans = [
        pb.TokenSpan(
            first=starts.index(text.index(answer)),
            last=ends.index(text.index(answer) + len(answer)),
        )
        for answer in answers
    ]
    request = pb.DecodeSpansRequest(passage=passage, spans=spans, text=text)
    reply = await stub.DecodeSpans(request)
    assert [span.text for span in reply.spans] == answers
    assert [text[span.start : span.end] for span in reply.spans] == answers
    request.text = ""
    reply = await stub.DecodeSpans(request)
    assert [text[span.start : span.end] for span in reply.spans] == answers
    assert not any(span.text for span in reply.spans)


async def test_ids_to_text(stub: Stub, tokenizer: TextTokenizer) -> None:
    reply = await stub.Encode(pb.EncodeRequest(question="the", text="tower"))
    ids = np.frombuffer(reply.windows[0].input_ids, "<i4").tolist()
    assert (await stub.Decode(pb.DecodeRequest(ids=ids))).text == "[CLS] the [SEP] tower [SEP]"
    plain = await stub.Decode(pb.DecodeRequest(ids=ids, skip_special_tokens=True))
    assert plain.text == "the tower"


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (pb.EncodeRequest(text="x"), "INVALID_ARGUMENT", "question: is empty"),
        (pb.EncodeRequest(question="\0 \n", text="x"), "INVALID_ARGUMENT", "question: holds noth"),
        (pb.EncodeRequest(question="x", text=""), "INVALID_ARGUMENT", "text: is empty"),
        (pb.EncodeRequest(question="x"), "INVALID_ARGUMENT", "passage: neither"),
        (pb.EncodeRequest(question="x " * 400, text="x"), "INVALID_ARGUMENT", "question: 400 tok"),
        (pb.EncodeRequest(question="x", text="x", max_length=513), "INVALID_ARGUMENT", "max_len"),
        (
            pb.EncodeRequest(question="x", text="x " * 99, max_length=20, stride=16),
            "INVALID_ARGUMENT",
            "stride: 16 tokens",
        ),
        (
            pb.EncodeRequest(question="x", text="x", options=UNKNOWN_FORM),
            "INVALID_ARGUMENT",
            "options.normalization",
        ),
        (
            pb.EncodeRequest(question="x", text="x" * 1_000_001),
            "RESOURCE_EXHAUSTED",
            "text: 1000001 characters",
        ),
        (
            pb.EncodeRequest(question="x", tokenized=pb.TokenizedText(input_ids=b"abc")),
            "INVALID_ARGUMENT",
            "tokenized.input_ids: 3 bytes",
        ),
        (
            pb.EncodeRequest(question="x", tokenized=pb.TokenizedText(fingerprint="other")),
            "FAILED_PRECONDITION",
            "tokenized: made by another",
        ),
    ],
)  # fmt: skip
async def test_bad_requests(
    stub: Stub, request_: pb.EncodeRequest, status: str, message: str
) -> None:
    code, details = await refusal(stub.Encode(request_))
    assert code.name == status
    assert details.startswith(message)


async def test_bad_spans_and_ids(stub: Stub, tokenizer: TextTokenizer) -> None:
    passage = (await stub.Encode(pb.EncodeRequest(question="x", text="a b c"))).passage

    def ask(first: int, last: int, text: str = "", count: int = 1) -> Any:
        spans = [pb.TokenSpan(first=first, last=last)] * count
        return stub.DecodeSpans(pb.DecodeSpansRequest(passage=passage, spans=spans, text=text))

    for first, last in ((0, 3), (2, 1), (2**32 - 1, 2**32 - 1), (0, 2**32 - 1)):
        code, details = await refusal(ask(first, last))
        assert code is grpc.StatusCode.OUT_OF_RANGE
        assert details.startswith("spans[0]: ")
    code, details = await refusal(ask(0, 0, "a b"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("text: 3 characters")
    code, details = await refusal(ask(0, 0, count=101))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    code, details = await refusal(stub.Decode(pb.DecodeRequest(ids=[0, 2**32 - 1])))
    assert code is grpc.StatusCode.OUT_OF_RANGE
    assert details.startswith("ids[1]: ")


async def test_short_requests_overtake_long_ones(stub: Stub) -> None:
    """The event loop answers while a million characters are tokenised."""
    long = asyncio.ensure_future(stub.Encode(pb.EncodeRequest(question="x", text=LONG)))
    short = 0
    while not long.done():
        await stub.Encode(pb.EncodeRequest(question="who?", text="the tower"))
        short += 1
    assert len((await long).windows) > 500
    assert short >= 2, "none was answered before the long one"


async def test_what_callers_send_is_not_logged(
    stub: Stub, channel: aio.Channel, service: Service
) -> None:
    for request in (
        pb.EncodeRequest(question=SECRET, text=SECRET),
        pb.EncodeRequest(question=SECRET * 500, text="x"),
        pb.EncodeRequest(question=SECRET, text="x" + SECRET * 100_000),
        pb.EncodeRequest(question="x", tokenized=pb.TokenizedText(fingerprint=SECRET)),
    ):
        (outcome,) = await asyncio.gather(stub.Encode(request), return_exceptions=True)
        if isinstance(outcome, aio.AioRpcError):
            assert SECRET not in (outcome.details() or "")
    raw: Any = channel.unary_unary("/miaotui.v1.TokenizerService/Encode")
    # Field 2, "question", in bytes that are not UTF-8.
    question = SECRET.encode() + b"\xff\xfe"
    code, details = await refusal(raw(b"\x12" + bytes([len(question)]) + question))
    assert code is not grpc.StatusCode.OK
    assert SECRET not in details
    await stub.Describe(pb.TokenizerServiceDescribeRequest())  # alive
    assert "listens on" in service.process.log
    assert SECRET not in service.process.log


async def test_metrics(stub: Stub, service: Service) -> None:
    await stub.Encode(pb.EncodeRequest(question="who?", text="the tower " * 1000))
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(f"http://127.0.0.1:{service.metrics_port}/metrics")).text
    for name in ("tokens_total", "windows_total", "queue_duration_seconds_bucket"):
        assert f"miaotui_tokenizer_{name}" in text


async def test_refuses_to_start_and_says_why(tmp_path: Path) -> None:
    def start(**env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "services.tokenizer"],
            env={**clean_environment(), **env},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    unset, missing = await asyncio.gather(
        asyncio.to_thread(start),
        asyncio.to_thread(start, MIAOTUI_TOKENIZER_MODEL=str(tmp_path / "missing")),
    )
    assert unset.returncode == 2
    assert "MIAOTUI_TOKENIZER_MODEL" in unset.stderr
    assert missing.returncode == 2
    assert "no such model directory" in missing.stderr
    assert "Traceback" not in missing.stderr


async def test_sigterm_finishes_what_runs(stub: Stub, service: Service) -> None:
    """Last, as it stops the service of the tests above."""
    long = asyncio.ensure_future(stub.Encode(pb.EncodeRequest(question="x", text=LONG)))
    await stub.Encode(pb.EncodeRequest(question="who?", text="the tower"))  # after the long one
    service.process.process.terminate()
    assert len((await long).windows) > 500
    assert await asyncio.to_thread(service.process.wait) == 0
