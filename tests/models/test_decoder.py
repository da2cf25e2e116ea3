"""Split decoders write, token for token, what transformers' `generate` writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miaotui.engine.decode.types import SamplingParams
from miaotui.models import packed
from miaotui.models.decoder_stage import DecoderStageModel
from miaotui.models.writing_stage import DecoderBatch
from tests.decoder_checkpoints import DECODER_FAMILIES, make_decoder
from tests.models.decoding import (
    BLOCK,
    Writing,
    generate,
    load_stages,
    random_prompt,
    reference_model,
    scattered,
    step,
    write,
)

FULL = bool(os.environ.get("MIAOTUI_FULL"))
SPLITS = {1: "0-4", 2: "0-1,1-4", 3: "0-1,1-3,3-4"}
# Around the windows (24) and blocks (8), a single token, neighbours of equal length.
LENGTHS = (40, 1, 7, 23, 24, 25, 25, 70)
TOKENS = 24


Pairs = list[tuple[list[int], list[int]]]


class Decoders(dict[str, Path]):
    """Family to checkpoint, made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, family: str) -> Path:
        self[family] = make_decoder(self.root / family, family, seed=3)
        return self[family]


class Texts(dict[str, Pairs]):
    """Family to (prompt, what transformers writes after it), written when first asked for."""

    def __init__(self, decoders: Decoders) -> None:
        super().__init__()
        self.decoders = decoders

    def __missing__(self, family: str) -> Pairs:
        prompts = [random_prompt(length, seed) for seed, length in enumerate(LENGTHS)]
        directory = self.decoders[family]
        pairs = [(prompt, generate(directory, prompt, TOKENS)) for prompt in prompts]
        # Not vacuous: texts are varied and depend on the prompt.
        assert len({token for _, text in pairs for token in text}) > 30
        assert len({tuple(text) for _, text in pairs}) == len(prompts)
        self[family] = pairs
        return pairs


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Decoders:
    return Decoders(tmp_path_factory.mktemp("decoders"))


@pytest.fixture(scope="module")
def texts(decoders: Decoders) -> Texts:
    return Texts(decoders)


def writings(pairs: Pairs, **options: Any) -> list[Writing]:
    tables = scattered(len(pairs), max(LENGTHS) + TOKENS)
    return [
        Writing(index, prompt, TOKENS, tables[index], **options)
        for index, (prompt, _) in enumerate(pairs)
    ]


def texts_of(done: list[Writing]) -> list[list[int]]:
    return [writing.written for writing in done]


@pytest.mark.parametrize("stages", SPLITS)
@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_mixed_batches_equal_generate(
    decoders: Decoders,
    texts: Texts,
    family: str,
    stages: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if stages == 1:  # as weights of real size are
        monkeypatch.setattr(packed, "_PACKED_ELEMENTS", 0)
    done = writings(texts[family])
    write(load_stages(decoders[family], SPLITS[stages]), done)
    assert texts_of(done) == [text for _, text in texts[family]]


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_alone_and_unfused_equal_generate(decoders: Decoders, texts: Texts, family: str) -> None:
    stages = load_stages(decoders[family], SPLITS[2], fused=False)
    for writing, (_, text) in zip(writings(texts[family])[:2], texts[family], strict=False):
        write(stages, [writing])
        assert writing.written == text


@pytest.mark.parametrize("chunk", [1, 5, 9, 24] if FULL else [9])
@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_chunked_prompts_beside_others_tokens(
    decoders: Decoders, texts: Texts, family: str, chunk: int
) -> None:
    """Chunks of some prompts share batches with others' single tokens."""
    done = writings(texts[family], chunk=chunk)
    write(load_stages(decoders[family], SPLITS[3]), done)
    assert texts_of(done) == [text for _, text in texts[family]]


@pytest.mark.parametrize("length", [1, 3, 7, 12] if FULL else [4, 12])
@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_drafts_change_nothing(decoders: Decoders, texts: Texts, family: str, length: int) -> None:
    """Right guesses, guesses that go wrong after some tokens, and wrong ones, in one batch."""
    done = writings(texts[family])

    def guesser(index: int, text: list[int]) -> Any:
        def guess(written: int) -> list[int]:
            right = text[written : written + length]
            if index % 3 == 0:
                return right
            cut = (written % length) if index % 3 == 1 else 0
            return [token if i < cut else (token + 1) % 640 for i, token in enumerate(right)]

        return guess

    for index, (writing, (_, text)) in enumerate(zip(done, texts[family], strict=True)):
        writing.guess = guesser(index, text)
    write(load_stages(decoders[family], SPLITS[2]), done)
    assert texts_of(done) == [text for _, text in texts[family]]
    # Right drafts are taken whole; wrong ones give one token a step.
    assert len(done[0].samples) == 1 + -(-(TOKENS - 1) // (length + 1))
    assert len(done[2].samples) == TOKENS


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_shared_prefixes_are_computed_once(decoders: Decoders, texts: Texts, family: str) -> None:
    """A second sequence begins with the first one's blocks, and computes only the rest."""
    prompt, text = texts[family][0]
    shared = 4 * BLOCK
    first, second = scattered(2, len(prompt) + TOKENS)
    stages = load_stages(decoders[family], SPLITS[2])
    one = Writing(1, prompt, TOKENS, first)
    step(stages, [one])
    other = prompt[:shared] + random_prompt(9, seed=77)
    blocks = first[: shared // BLOCK] + second
    again = Writing(2, prompt, TOKENS, blocks, cached=shared)
    differs = Writing(3, other, TOKENS, first[: shared // BLOCK] + second[::-1], cached=shared)
    write(stages, [again])
    write(stages, [one, differs])
    assert one.written == again.written == text
    assert differs.written == generate(decoders[family], other, TOKENS)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        (
            "llama",
            {"rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }},
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        (
            "qwen2",
            {"rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                "original_max_position_embeddings": 64,
            }},
        ),
        ("llama", {"attention_bias": True, "mlp_bias": True, "kv_heads": 4}),
        ("llama", {"tie_word_embeddings": True, "kv_heads": 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
        ("mistral", {"sliding_window": None, "head_dim": 24}),
        ("gemma3_text", {"final_logit_softcapping": 5.0, "tie_word_embeddings": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}),
    ],
)  # fmt: skip
def test_configurations(tmp_path: Path, family: str, extra: dict[str, Any]) -> None:
    directory = make_decoder(tmp_path, family, seed=5, tokenizer=False, **extra)
    prompts = [random_prompt(length, seed) for seed, length in enumerate((30, 9))]
    tables = scattered(2, 30 + TOKENS)
    done = [Writing(i, p, TOKENS, tables[i], chunk=20) for i, p in enumerate(prompts)]
    write(load_stages(directory, SPLITS[2]), done)
    assert texts_of(done) == [generate(directory, prompt, TOKENS) for prompt in prompts]


def test_logprobs_are_transformers(decoders: Decoders) -> None:
    prompt = random_prompt(12, 0)
    directory = decoders["gemma2"]
    writing = Writing(
        1, prompt, 4, scattered(1, 32)[0], sampling=SamplingParams(temperature=1.0, logprobs=3)
    )
    write(load_stages(directory, "0-2,2-4"), [writing])
    with torch.no_grad():
        logits = reference_model(directory)(torch.tensor([prompt + writing.written])).logits[0]
    expected = logits.log_softmax(-1)[len(prompt) - 1 :]
    places = [place for sample in writing.samples for place in sample.logprobs]
    assert len(places) == 4
    for place, row, token in zip(places, expected, writing.written, strict=False):
        assert place.chosen[0] == token
        assert place.chosen[1] == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(3)
        assert [pair[0] for pair in place.top] == best.indices.tolist()
        assert [pair[1] for pair in place.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_bfloat16_stays_near_float32(
    decoders: Decoders, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attention that copies contexts, which half precision takes, against the other."""
    rows: list[torch.Tensor] = []
    compute = DecoderStageModel.logits

    def record(stage: DecoderStageModel, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(compute(stage, hidden))
        return rows[-1]

    monkeypatch.setattr(DecoderStageModel, "logits", record)
    results = []
    prompts = [random_prompt(length, length) for length in (40, 12, 27)]
    for dtype in (torch.float32, torch.bfloat16):
        (stage,) = load_stages(decoders[family], "0-4", dtype=dtype)
        rows.clear()
        for chunk in (30, 1, 4):
            tables = scattered(3, 64)
            # One token each: the same prompts in both, whatever is sampled.
            write([stage], [Writing(i, p, 1, tables[i], chunk) for i, p in enumerate(prompts)])
        results.append(torch.cat(rows))
    exact, rounded = results
    assert exact.shape == rounded.shape == (9, 640)
    assert (exact - rounded).abs().mean() < 0.05 * exact.std()


def test_released_sequences_are_forgotten(decoders: Decoders) -> None:
    (stage,) = load_stages(decoders["llama"], "0-4")
    sampler: Any = stage._sampler
    done = [Writing(i, random_prompt(5, i), 3, table) for i, table in enumerate(scattered(3, 16))]
    write([stage], done)
    assert len(sampler) == 3
    last = Writing(9, random_prompt(5, 9), 1, scattered(1, 16, seed=4)[0])
    item, ids = last.next_slice()
    stage.run(DecoderBatch([len(ids)], [item], torch.tensor(ids), released=[0, 1, 2, 55]))
    assert len(sampler) == 1


def test_int32_ids_and_read_only_blocks(decoders: Decoders) -> None:
    (stage,) = load_stages(decoders["qwen3"], "0-4")
    writing = Writing(1, random_prompt(9, 1), 1, scattered(1, 16)[0])
    item, ids = writing.next_slice()
    item.blocks = np.frombuffer(item.blocks.tobytes(), np.int32)
    batch = DecoderBatch([len(ids)], [item], torch.tensor(ids, dtype=torch.int32))
    assert isinstance(stage.run(batch), list)
