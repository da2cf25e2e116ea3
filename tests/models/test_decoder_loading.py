"""Decoder checkpoints: what is read, what is refused, plans, and batches that do not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from miaotui.engine.decode.types import DecodeSlice, SamplingParams, SequenceStart
from miaotui.models.costs import estimate_costs, measure_costs
from miaotui.models.decoder_stage import DecoderStageModel
from miaotui.models.errors import (
    BatchError,
    CheckpointError,
    ModelError,
    PartitionError,
    UnsupportedModelError,
)
from miaotui.models.families import FAMILIES as REGISTRY
from miaotui.models.layers import LayerRange
from miaotui.models.loading import load_stage, model_kind
from miaotui.models.partition import plan_stages
from miaotui.models.stage import StageModel
from miaotui.models.writing_stage import DecoderBatch
from tests.checkpoints import make_checkpoint
from tests.decoder_checkpoints import (
    DECODER_FAMILIES,
    make_decoder,
    make_decoder_config,
    make_decoder_tokenizer,
)
from tests.models.decoding import Writing, generate, load_stages, random_prompt, scattered, write

WEIGHTS = "model.safetensors"
NONE = np.zeros(0, np.int32)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A checkpoint of the test's own, to change."""
    return make_decoder(tmp_path / "llama", "llama", layers=3, tokenizer=False)


def load(directory: Path, layers: LayerRange | None = None, **more: Any) -> DecoderStageModel:
    return DecoderStageModel.load(directory, layers, device="cpu", dtype="float32", **more)


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(
    directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    save_file(change(load_file(directory / WEIGHTS)), directory / WEIGHTS)


def writes(directory: Path, split: str = "0-2,2-3") -> list[int]:
    writing = Writing(1, random_prompt(9, 0), 8, scattered(1, 32)[0])
    write(load_stages(directory, split), [writing])
    return writing.written


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tensors_without_the_models_prefix(tmp_path: Path, family: str) -> None:
    """As the base model is published, GPT-2's most of all; masks in old files are not read."""
    directory = make_decoder(tmp_path, family, layers=3, tokenizer=False)
    expected = writes(directory)

    def bare(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {name.split(".", 1)[1] if name[0] in "mt" else name: tensor
                   for name, tensor in tensors.items()}  # fmt: skip
        assert ("h.0.ln_1.weight" if family == "gpt2" else "norm.weight") in renamed
        return renamed | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}

    edit_tensors(directory, bare)
    assert writes(directory) == expected


def test_tied_heads(tmp_path: Path) -> None:
    """Read from either name, held once by a stage that has both, untied where they differ."""
    directory = make_decoder(tmp_path, "qwen2", layers=3, tokenizer=False)
    expected = writes(directory)
    one = load(directory)
    assert writes(directory, "0-3") == expected
    config = one.shape
    table = config.vocab_size * config.hidden_size
    assert one.info.parameter_bytes == one.info.model_parameter_bytes
    halves = [load(directory, LayerRange(0, 2)), load(directory, LayerRange(2, 3))]
    both = sum(half.info.parameter_bytes for half in halves)
    assert both == one.info.parameter_bytes + 4 * table
    head: Any = one._skeleton.head
    embedding: Any = one._skeleton.embedding
    assert head.weight.data_ptr() == embedding.weight.data_ptr()

    def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            "lm_head.weight" if "embed" in name else name: tensor
            for name, tensor in tensors.items()
        }

    edit_tensors(directory, renamed)
    assert writes(directory) == writes(directory, "0-3") == expected
    edit_tensors(
        directory,
        lambda tensors: tensors | {"model.embed_tokens.weight": tensors["lm_head.weight"].flip(0)},
    )
    other = generate(directory, random_prompt(9, 0), 8)
    assert other != expected
    assert writes(directory) == writes(directory, "0-3") == other


def test_half_precision_files_in_parts(tmp_path: Path) -> None:
    directory = make_decoder(
        tmp_path, "qwen3", layers=3, dtype=torch.bfloat16, max_shard_size=60_000, tokenizer=False
    )
    assert len(list(directory.glob("*.safetensors"))) > 2
    assert writes(directory) == generate(directory, random_prompt(9, 0), 8)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "no language-model head"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"model_type": "mixtral"}, "supported are .*qwen3"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
         "depends on the sequence"),
    ],
)  # fmt: skip
def test_unsupported_models(llama: Path, changes: dict[str, Any], named: str) -> None:
    edit_config(llama, **changes)
    with pytest.raises(UnsupportedModelError, match=named):
        load_stage(llama, device="cpu")


def test_no_head_and_missing_tensors(llama: Path) -> None:
    def without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        return lambda tensors: {key: value for key, value in tensors.items() if name not in key}

    edit_tensors(llama, without("lm_head"))
    load(llama, LayerRange(0, 2))  # does not need it
    with pytest.raises(UnsupportedModelError, match=r"no language-model head \(lm_head.weight\)"):
        load(llama, LayerRange(2, 3))
    edit_tensors(llama, without("layers.1."))
    load(llama, LayerRange(0, 1))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\."):
        load(llama, LayerRange(0, 2))


def test_the_right_kind_of_stage(llama: Path, tmp_path: Path) -> None:
    bert = make_checkpoint(tmp_path / "bert", "bert", layers=1, tokenizer=False)
    assert (model_kind(llama), model_kind(bert)) == ("generative", "extractive")
    assert isinstance(load_stage(bert, device="cpu"), StageModel)
    stage = load_stage(llama, LayerRange(1, 3), device="cpu", kv_cache_bytes=1 << 20)
    assert isinstance(stage, DecoderStageModel)
    assert (stage.info.kind, stage.info.kv_block_tokens) == ("generative", 16)
    assert (stage.info.is_first, stage.info.is_last) == (False, True)
    # 2 layers, keys and values, 2 heads of 8.
    itemsize = 2 if stage.info.dtype == "bfloat16" else 4
    assert stage.info.kv_blocks == (1 << 20) // (2 * 2 * 2 * 8 * 16 * itemsize)
    with pytest.raises(UnsupportedModelError, match="generates text"):
        StageModel.load(llama, device="cpu")
    with pytest.raises(UnsupportedModelError, match="does not generate"):
        DecoderStageModel.load(bert, device="cpu")
    with pytest.raises(PartitionError, match="the model has 3"):
        load(llama, LayerRange(0, 4))


def test_a_cache_must_hold_a_context(llama: Path) -> None:
    block = 2 * 3 * 2 * 8 * 16 * 4
    assert load(llama, kv_cache_bytes=32 * block).info.kv_blocks == 32  # 512 tokens
    with pytest.raises(ModelError, match=f"at least {32 * block} bytes"):
        load(llama, kv_cache_bytes=32 * block - 1)
    with pytest.raises(ValueError, match="kv_block_tokens"):
        load(llama, kv_block_tokens=0)
    assert load(llama).info.kv_blocks >= 32


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_plans_account_for_every_byte(tmp_path: Path, family: str) -> None:
    directory = make_decoder(tmp_path, family, layers=3, tokenizer=False)
    for count in (1, 2, 3):
        plan = plan_stages(directory, count, dtype="float32", device="cpu")
        held = 0
        for stage in plan.stages:
            info = load(directory, stage.layers).info
            assert info.parameter_bytes == stage.parameter_bytes
            held += info.parameter_bytes
        assert held == plan.parameter_bytes
        if count == 1:
            model = AutoModelForCausalLM.from_pretrained(directory)
            assert held == 4 * sum(p.numel() for p in model.parameters())


MEASURE = """
import sys, psutil
from miaotui.models.decoder_stage import DecoderStageModel
from miaotui.models.layers import LayerRange
big, small = sys.argv[1:]
DecoderStageModel.load(small, device="cpu").warm_up()  # libraries and lazy imports
held = []
for layers in (LayerRange(2, 4), LayerRange(0, 8)):
    before = psutil.Process().memory_info().rss
    held.append(DecoderStageModel.load(big, layers, dtype="float32", device="cpu"))
    print(psutil.Process().memory_info().rss - before, held[-1].info.parameter_bytes)
"""


def test_a_stages_memory_is_its_share(tmp_path: Path) -> None:
    """Nothing is left of what was packed, and the cache takes memory as it is filled."""
    big = make_decoder(
        tmp_path / "big", "llama", layers=8, hidden=512, heads=8, kv_heads=4,
        max_shard_size="30MB", tokenizer=False,
    )  # fmt: skip
    small = make_decoder(tmp_path / "small", "llama", layers=1, tokenizer=False)
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, big, small], check=True, capture_output=True, text=True
    ).stdout
    for line in output.splitlines():
        resident, parameters = map(int, line.split())
        assert 0.9 * parameters < resident < 1.15 * parameters + 4_000_000


def test_the_head_counts_on_the_last_stage(tmp_path: Path) -> None:
    shape = REGISTRY["llama"].shape(make_decoder_config("llama", vocab_size=640))
    costs = estimate_costs(shape)
    assert costs.head == pytest.approx(256 * 2 * 32 * 640)
    # Attention and three matrices of 32 x 96, for each token.
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96)
    assert costs.layers[0] == pytest.approx(256 * (matrices + 4 * 256 * 32))
    directory = make_decoder(tmp_path, "llama", layers=6, vocab_size=5000, tokenizer=False)
    plan = plan_stages(directory, 2, device="cpu")
    assert len(plan.stages[0].layers) > len(plan.stages[1].layers)
    bigger = replace(shape, vocab_size=100_000)
    assert estimate_costs(bigger).head > 50 * costs.head


def test_measured_costs(llama: Path) -> None:
    costs = measure_costs(llama, dtype="float32", device="cpu", repeats=1, length=64)
    assert costs.unit == "s"
    assert len(costs.layers) == 3
    assert costs.head > 0
    assert len(plan_stages(llama, 2, costs=costs).stages) == 2


def batch(lengths: list[int], slices: list[DecodeSlice], **inputs: Any) -> DecoderBatch:
    ids = torch.full((sum(lengths),), 7) if not inputs else None
    return DecoderBatch(lengths, slices, **(inputs or {"input_ids": ids}))


def a_slice(start: int = 0, blocks: Any = (0,), samples: int = 1) -> DecodeSlice:
    begin = SequenceStart(SamplingParams(), NONE, NONE)
    return DecodeSlice(5, start, np.array(blocks, np.int32), samples, begin=begin)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (batch([], []), "0 slices"),
        (batch([3], [a_slice(), a_slice()]), "2 slices and 1 lengths"),
        (batch([17], [a_slice()]), "do not hold 17"),
        (batch([4], [a_slice(start=13)]), "do not hold 17"),
        (batch([4], [a_slice(samples=5)]), "cannot be"),
        (batch([4], [a_slice(start=-1)]), "cannot be"),
        (batch([4], [a_slice(blocks=[10_000])]), "the cache has"),
        (batch([4], [a_slice(blocks=[-1])]), "the cache has"),
        (batch([513], [a_slice(blocks=range(33))]), "513 tokens"),
        (batch([2], [a_slice()], input_ids=torch.tensor([1, 640])), "0 to 639"),
        (batch([2], [a_slice()], input_ids=torch.tensor([-1, 4])), "0 to 639"),
        (batch([2], [a_slice()], input_ids=torch.tensor([1])), "call for"),
        (batch([2], [a_slice()], hidden=torch.zeros(2, 32)), "got none"),
        (
            batch([1], [DecodeSlice(77, 0, np.zeros(1, np.int32), 1)]),
            "has not begun",
        ),
    ],
)
def test_batches_that_do_not_fit(tmp_path: Path, bad: DecoderBatch, message: str) -> None:
    directory = make_decoder(tmp_path, "llama", layers=1, tokenizer=False)
    stage = load(directory, kv_cache_bytes=1 << 20)
    with pytest.raises(BatchError, match=message):
        stage.run(bad)
    assert isinstance(stage.run(batch([3], [a_slice()])), list)  # and goes on


def test_later_stages_check_activations(llama: Path) -> None:
    stage = load(llama, LayerRange(1, 3), kv_cache_bytes=1 << 20)
    with pytest.raises(BatchError, match="takes hidden"):
        stage.run(batch([3], [a_slice()]))
    with pytest.raises(BatchError, match="hidden has shape"):
        stage.run(batch([3], [a_slice()], hidden=torch.zeros(3, 31)))


def test_the_test_tokenizer_works(tmp_path: Path) -> None:
    tokenizer = make_decoder_tokenizer()
    for text in ("How long is the Yangtze?", "北京是首都。\n😀"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "长江有多长?"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<s><|start|>user\n长江有多长?<|end|>\n<|start|>assistant\n"
    assert len(tokenizer) == 640
