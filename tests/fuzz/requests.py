"""Requests of gRPC that are right, for the cases to send or to spoil."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping

from google.protobuf.message import Message

from miaotui.v1 import gateway_pb2, shard_pb2, tensor_pb2, tokenizer_pb2
from tests.fuzz.cases import MARK
from tests.fuzz.pictures import picture
from tests.fuzz.sound import sound

Making = Callable[[random.Random], Message]
_CONTEXT = f"Ada Lovelace wrote the first program, {MARK}, in 1843. 艾达写的。"
# Of tests/media/checkpoints.py's models.
_HEARD, _SEEN = (20, 200), (3, 16, 16)


def _ids(*ids: int) -> bytes:
    return struct.pack(f"<{len(ids)}i", *ids)


def _sampling() -> shard_pb2.SamplingParams:
    return shard_pb2.SamplingParams(temperature=0.7, top_k=5)


def good_requests(role: str) -> dict[str, Making]:
    """What makes a request that is right, by the method's full name.

    `role`: of the model that is asked, "hearer" or "seer"; others get what reads and writes.
    """
    made = {name: _always(message) for name, message in _texts().items()}
    return {**made, **_MEDIA.get(role, {})}


def _always(message: Message) -> Making:
    return lambda _: message


def _texts() -> dict[str, Message]:
    answer = gateway_pb2.AnswerRequest(question="Who wrote it?", context=_CONTEXT)
    options = gateway_pb2.WriteOptions(max_tokens=3, sampling=_sampling(), seeded=True)
    chat = tokenizer_pb2.ChatPrompt(
        messages=[tokenizer_pb2.ChatMessage(role="user", content="你好, who?")]
    )
    infer = shard_pb2.InferRequest(
        request_id="fuzz", sequences=[shard_pb2.TokenSequence(input_ids=_ids(2, 7, 9, 3))]
    )
    generate = shard_pb2.GenerateRequest(
        request_id="fuzz", input_ids=_ids(1, 9, 8, 7), max_tokens=4, stop_token_ids=[2]
    )
    encode = tokenizer_pb2.EncodeRequest(
        request_id="fuzz", question="Who wrote it?", text=_CONTEXT, max_length=32
    )
    prompt = tokenizer_pb2.EncodePromptRequest(request_id="fuzz", chat=chat)
    decode = tokenizer_pb2.DecodeBatchRequest(
        request_id="fuzz",
        items=[tokenizer_pb2.DecodeItem(token_ids=_ids(9, 8, 7), read_offset=1)],
        pieces=[9],
    )
    return {
        "GatewayService/Answer": answer,
        "GatewayService/AnswerBatch": gateway_pb2.AnswerBatchRequest(requests=[answer, answer]),
        "GatewayService/Write": gateway_pb2.WriteRequest(text="Ada", options=options),
        "GatewayService/Chat": gateway_pb2.ChatRequest(chat=chat, options=options),
        "ShardService/Infer": infer,
        "ShardService/InferStream": shard_pb2.InferStreamRequest(request=infer),
        "ShardService/Generate": generate,
        "ShardService/GenerateStream": shard_pb2.GenerateStreamRequest(request=generate),
        "TokenizerService/Encode": encode,
        "TokenizerService/EncodeStream": tokenizer_pb2.EncodeStreamRequest(request=encode),
        "TokenizerService/EncodePrompt": prompt,
        "TokenizerService/EncodePromptStream": tokenizer_pb2.EncodePromptStreamRequest(
            request=prompt
        ),
        "TokenizerService/Decode": tokenizer_pb2.DecodeRequest(ids=[5, 6, 7]),
        "TokenizerService/DecodeBatch": decode,
        "TokenizerService/DecodeBatchStream": tokenizer_pb2.DecodeBatchStreamRequest(
            request=decode
        ),
        "TokenizerService/ExtractFeatures": tokenizer_pb2.ExtractFeaturesRequest(
            request_id="fuzz", file=b"RIFF"
        ),
    }


def _extract(file: Callable[[random.Random], bytes]) -> Making:
    return lambda chance: tokenizer_pb2.ExtractFeaturesRequest(request_id="fuzz", file=file(chance))


def _generate(shape: tuple[int, ...]) -> Making:
    def make(chance: random.Random) -> shard_pb2.GenerateRequest:
        size = 4
        for side in shape:
            size *= side
        odd = (-3e38, 1e30, float("nan"), float("inf"))
        value = chance.choice((0.0, 1.0, -0.5, chance.gauss(0, 1), chance.choice(odd)))
        data = struct.pack("<f", value) * (size // 4)
        if chance.random() < 0.1:
            data = chance.randbytes(size)
        header = tensor_pb2.TensorHeader(dtype=tensor_pb2.DTYPE_FLOAT32, shape=shape)
        return shard_pb2.GenerateRequest(
            request_id="fuzz",
            input_ids=_ids(1),
            max_tokens=4,
            stop_token_ids=[2],
            features=shard_pb2.Features(header=header, data=data),
        )

    return make


def _media(
    file: Callable[[random.Random], bytes], shape: tuple[int, ...], begin: tokenizer_pb2.MediaPrompt
) -> dict[str, Making]:
    generate = _generate(shape)
    prompt = tokenizer_pb2.EncodePromptRequest(request_id="fuzz", media=begin)
    streamed = tokenizer_pb2.EncodePromptStreamRequest(request=prompt)

    def stream(chance: random.Random) -> shard_pb2.GenerateStreamRequest:
        request = generate(chance)
        assert isinstance(request, shard_pb2.GenerateRequest)
        return shard_pb2.GenerateStreamRequest(request=request)

    return {
        "TokenizerService/ExtractFeatures": _extract(file),
        "TokenizerService/EncodePrompt": _always(prompt),
        "TokenizerService/EncodePromptStream": _always(streamed),
        "ShardService/Generate": generate,
        "ShardService/GenerateStream": stream,
    }


_SPOKEN = tokenizer_pb2.MediaPrompt(language="zh", previous="Ada")
_MEDIA: Mapping[str, Mapping[str, Making]] = {
    "hearer": _media(sound, _HEARD, _SPOKEN),
    "seer": _media(picture, _SEEN, tokenizer_pb2.MediaPrompt()),
}
