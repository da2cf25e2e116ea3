"""Split encoder-decoder models write, token for token, what transformers' `generate` writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from miaotui.cli.planning import make_plan, show_plan
from miaotui.engine.decode.suppression import Suppression
from miaotui.engine.decode.types import DecodeSlice, SampledTokens, SamplingParams, SequenceStart
from miaotui.models.errors import (
    BatchError,
    CheckpointError,
    PartitionError,
    UnsupportedModelError,
)
from miaotui.models.layers import LayerRange
from miaotui.models.loading import load_stage
from miaotui.models.partition import plan_stages
from miaotui.models.seq2seq_stage import Seq2SeqStageModel
from miaotui.models.writing_stage import DecoderBatch
from tests.seq2seq_checkpoints import (
    BEGIN_SUPPRESSED,
    SEQ2SEQ_FAMILIES,
    SUPPRESSED,
    VOCABULARY,
    generate_about,
    make_seq2seq,
    random_source,
    reference_model,
)

BLOCK, BLOCKS, TOKENS = 8, 200, 12
# Two encoder and three decoder layers, cut within the one, between both, and within the other.
SPLITS = ("0-5", "0-1,1-5", "0-2,2-5", "0-4,4-5", "0-1,1-3,3-5", "0-2,2-3,3-5")
PROMPTS = ([1, 40, 50], [1], [1, 60, 61, 62, 63, 64, 65, 66, 67, 68], [1, 40])
NONE = np.zeros(0, np.int32)


def load_stages(directory: Path, split: str) -> list[Seq2SeqStageModel]:
    """Stages with the same number of blocks each, warmed up."""
    stages = []
    for part in split.split(","):
        layers = LayerRange.parse(part)
        decoders = max(0, layers.end - max(2, layers.first))
        stage = Seq2SeqStageModel.load(
            directory,
            layers,
            dtype="float32",
            device="cpu",
            kv_cache_bytes=BLOCKS * BLOCK * decoders * 2 * 32 * 4,
            kv_block_tokens=BLOCK,
        )
        assert stage.info.kv_blocks == (BLOCKS if decoders else 1 << 20)
        stage.warm_up()
        stages.append(stage)
    return stages


class Text:
    """One text on its way; `chunk`: most tokens of its prompt a step, `guess`: what it drafts."""

    def __init__(
        self, family: str, number: int, prompt: list[int], *, chunk: int = 100, guess: Any = None
    ) -> None:
        self.number, self.known, self.sent = number, list(prompt), 0
        self.prompt, self.chunk, self.guess = len(prompt), chunk, guess
        self.source = random_source(family, number)
        each = -(-20 // BLOCK) - (-64 // BLOCK)
        drawn = np.random.default_rng(3).permutation(BLOCKS)[number * each : (number + 1) * each]
        self.blocks = drawn.astype(np.int32)

    @property
    def written(self) -> list[int]:
        """Without the token that ends it."""
        text = self.known[self.prompt :][:TOKENS]
        return text[: text.index(2)] if 2 in text else text

    @property
    def done(self) -> bool:
        text = self.known[self.prompt :]
        return len(text) >= TOKENS or 2 in text

    def slice(self, rows: int) -> tuple[DecodeSlice, int]:
        known = self.known[self.sent : self.sent + self.chunk]
        draft: list[int] = []
        samples = 1 if self.sent + len(known) == len(self.known) else 0
        if samples and self.guess is not None and len(self.known) > self.prompt:
            draft = self.guess(len(self.known) - self.prompt)
            samples += len(draft)
        ids = np.array(known + draft, np.int32)
        begin = None
        if not self.sent:
            begin = SequenceStart(SamplingParams(), NONE, NONE, self.source)
        blocks = self.blocks[: -(-rows // BLOCK) - (-(self.sent + len(ids)) // BLOCK)]
        item = DecodeSlice(
            self.number + 1, self.sent, blocks, samples, np.array(draft, np.int32), begin, ids
        )
        return item, len(ids)


def step(stages: list[Seq2SeqStageModel], texts: list[Text]) -> None:
    """Compute one batch of the texts' next slices."""
    source = stages[0].shape.source
    assert source is not None
    made = [text.slice(source.rows) for text in texts]
    slices, lengths = [item for item, _ in made], [length for _, length in made]
    result: torch.Tensor | list[SampledTokens] | None = None
    for stage in stages:
        assert not isinstance(result, list)
        result = stage.run(DecoderBatch(lengths, slices, hidden=result))
    assert isinstance(result, list)
    sampled = {item.sequence_id: item.token_ids.tolist() for item in result}
    for text, (item, length) in zip(texts, made, strict=True):
        tokens = sampled.get(item.sequence_id, [])
        text.sent += length - len(item.draft) + max(0, len(tokens) - 1)
        text.known += tokens


def write(stages: list[Seq2SeqStageModel], texts: list[Text]) -> None:
    while going := [text for text in texts if not text.done]:
        step(stages, going)


@pytest.fixture(scope="module", params=SEQ2SEQ_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seq2seq(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def expected(model: Path, family: str) -> list[list[int]]:
    texts = [
        generate_about(model, family, seed, prompt, TOKENS) for seed, prompt in enumerate(PROMPTS)
    ]
    assert len({tuple(text) for text in texts}) == len(PROMPTS)  # they depend on the source
    return texts


@pytest.mark.parametrize("split", SPLITS)
def test_batches_equal_generate(
    model: Path, family: str, expected: list[list[int]], split: str
) -> None:
    texts = [Text(family, number, prompt) for number, prompt in enumerate(PROMPTS)]
    stages = load_stages(model, split)
    step(stages, texts[:2])  # others join later
    write(stages, texts)
    assert [text.written for text in texts] == expected


def test_chunks_and_drafts_change_nothing(
    model: Path, family: str, expected: list[list[int]]
) -> None:
    """Prompts in parts, guesses that are right, and some that go wrong."""

    def guesser(text: list[int], wrong: bool) -> Any:
        def guess(written: int) -> list[int]:
            right = text[written : written + 4]
            return right[:2] + [(token + 1) % VOCABULARY for token in right[2:]] if wrong else right

        return guess

    texts = [
        Text(family, number, prompt, chunk=3, guess=guesser(expected[number], number % 2 == 1))
        for number, prompt in enumerate(PROMPTS)
    ]
    write(load_stages(model, "0-1,1-4,4-5"), texts)
    assert [text.written for text in texts] == expected


def test_logits_are_transformers(model: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[torch.Tensor] = []
    compute = Seq2SeqStageModel.logits

    def record(stage: Seq2SeqStageModel, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(compute(stage, hidden))
        return rows[-1].clone()

    stages = load_stages(model, "0-1,1-3,3-5")
    monkeypatch.setattr(Seq2SeqStageModel, "logits", record)
    text = Text(family, 2, PROMPTS[2])
    write(stages, [text])
    with torch.no_grad():
        given = torch.from_numpy(text.source)[None]
        ids = torch.tensor([text.known[:-1]])
        logits = reference_model(model, family)(given, decoder_input_ids=ids).logits[0]
    wanted = logits[text.prompt - 1 :]
    torch.testing.assert_close(torch.cat(rows), wanted, atol=1e-4, rtol=0)


def test_rows_of_another_width_are_projected(tmp_path: Path) -> None:
    """The encoder is wider than the decoder: what travels has the width of the wider."""
    family = "vision-encoder-decoder"
    model = make_seq2seq(tmp_path, family, encoder_width=48)
    text = Text(family, 4, [1, 44])
    stages = load_stages(model, "0-1,1-3,3-5")
    assert {stage.info.hidden_size for stage in stages} == {48}
    write(stages, [text])
    assert text.written == generate_about(model, family, 4, [1, 44], TOKENS)


def test_plans_account_for_every_byte(model: Path, family: str) -> None:
    for count in (1, 2, 3, 5):
        plan = plan_stages(model, count, dtype="float32", device="cpu")
        held = 0
        for stage in plan.stages:
            info = load_stage(model, stage.layers, dtype="float32", device="cpu").info
            assert info.parameter_bytes == stage.parameter_bytes
            held += info.parameter_bytes
        assert held == plan.parameter_bytes
        if count == 1:
            whole = reference_model(model, family)
            pooler = getattr(whole, "encoder", None)
            unused = sum(p.numel() for p in pooler.pooler.parameters()) if pooler else 0
            assert held == 4 * (sum(p.numel() for p in whole.parameters()) - unused)
    with pytest.raises(PartitionError, match="5 layers splits into 1 to 5"):
        plan_stages(model, 6)


def test_a_plan_is_shown(model: Path) -> None:
    console = Console(record=True, width=120)
    show_plan(console, make_plan(model, 2, layers="", dtype="float32", device="cpu", measure=False))
    shown = console.export_text()
    assert "2 encoder" in shown
    assert "decoder + head, sampler" in shown
    with pytest.raises(UnsupportedModelError, match="not measured"):
        make_plan(model, 2, layers="", dtype="float32", device="cpu", measure=True)


def test_half_precision_files(family: str, tmp_path: Path) -> None:
    model = make_seq2seq(tmp_path, family, dtype=torch.bfloat16)
    text = Text(family, 1, [1, 40])
    write(load_stages(model, "0-2,2-5"), [text])
    assert text.written == generate_about(model, family, 1, [1, 40], TOKENS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["WhisperForAudioClassification"]}, "writes no text"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_whispers_that_are_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    model = make_seq2seq(tmp_path, "whisper")
    edit_json(model / "config.json", **change)
    with pytest.raises(UnsupportedModelError, match=named):
        load_stage(model, device="cpu")


@pytest.mark.parametrize(
    ("part", "values", "named"),
    [
        ("encoder", {"model_type": "deit"}, "a deit encoder"),
        ("decoder", {"model_type": "bert"}, "a bert decoder"),
        ("decoder", {"add_cross_attention": False}, "without add_cross_attention"),
    ],
)
def test_pairs_that_are_refused(
    tmp_path: Path, part: str, values: dict[str, Any], named: str
) -> None:
    model = make_seq2seq(tmp_path, "vision-encoder-decoder")
    config = json.loads((model / "config.json").read_text())
    edit_json(model / "config.json", **{part: config[part] | values})
    with pytest.raises(UnsupportedModelError, match=named):
        load_stage(model, device="cpu")


def test_suppressed_tokens_are_read(tmp_path: Path) -> None:
    """From the generation configuration, else from config.json, as older checkpoints have them."""
    model = make_seq2seq(tmp_path, "whisper")
    cpu = torch.device("cpu")
    found = Suppression.read(model, VOCABULARY, cpu)
    assert found is not None
    assert (found.always.tolist(), found.at_begin.tolist()) == (SUPPRESSED, BEGIN_SUPPRESSED)
    (model / "generation_config.json").unlink()
    edit_json(model / "config.json", suppress_tokens=[5, 6, 50_000], begin_suppress_tokens=None)
    found = Suppression.read(model, VOCABULARY, cpu)
    assert found is not None
    assert (found.always.tolist(), found.at_begin.tolist()) == ([5, 6], [])
    (model / "generation_config.json").write_text('{"suppress_tokens": "none"}')
    with pytest.raises(CheckpointError, match="suppress_tokens must be a list of token ids"):
        load_stage(model, LayerRange(3, 5), device="cpu")
    (model / "generation_config.json").unlink()
    edit_json(model / "config.json", suppress_tokens=None)
    assert Suppression.read(model, VOCABULARY, cpu) is None


def test_batches_that_do_not_fit(tmp_path: Path) -> None:
    model = make_seq2seq(tmp_path, "whisper")
    first, last = load_stages(model, "0-3,3-5")
    text = Text("whisper", 0, [1, 40])
    item, length = text.slice(20)
    assert item.begin is not None

    def refused(stage: Seq2SeqStageModel, message: str, **changes: Any) -> None:
        hidden = changes.pop("hidden", None)
        with pytest.raises(BatchError, match=message):
            stage.run(DecoderBatch([length], [replace(item, **changes)], hidden=hidden))

    refused(first, r"\[6, 41\]", begin=replace(item.begin, source=np.zeros((6, 41), np.float32)))
    refused(first, "features of shape None", begin=replace(item.begin, source=None))
    refused(first, "fewer than the 3 blocks", blocks=item.blocks[:2])
    refused(first, "do not hold 2", blocks=item.blocks[:3])
    refused(first, "none of the cache's", blocks=item.blocks + BLOCKS)
    refused(first, "tokens range from", tokens=np.array([1, VOCABULARY], np.int32))
    refused(first, "begins at position 4", start=4)
    refused(last, "takes hidden, and got none")
    refused(last, "hidden has shape", hidden=torch.zeros(21, 32))
    step([first, last], [text])  # and goes on


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
