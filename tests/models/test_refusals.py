"""What cannot be served is refused with an error that says what is wrong and what to do."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel

from miaotui.models.errors import (
    BatchError,
    CheckpointError,
    PartitionError,
    UnsupportedModelError,
)
from miaotui.models.layers import LayerRange
from miaotui.models.stage import StageBatch, StageModel
from tests.checkpoints import make_checkpoint

WEIGHTS = "model.safetensors"


def load(directory: Path, layers: LayerRange | None = None) -> StageModel:
    return StageModel.load(directory, layers, device="cpu", dtype="float32")


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "t5", "made-up", None, 7])
def test_unsupported_family(bert: Path, model_type: object) -> None:
    edit_config(bert, model_type=model_type)
    with pytest.raises(UnsupportedModelError, match=r"supported are bert, distilbert, electra"):
        load(bert)


def test_code_in_a_checkpoint_is_never_run(bert: Path) -> None:
    edit_config(bert, auto_map={"AutoModelForQuestionAnswering": "evil.Model"})
    (bert / "evil.py").write_text("raise SystemExit('ran')")
    load(bert)


@pytest.mark.parametrize(
    ("model", "held"),
    [(BertForSequenceClassification, "classifier"), (BertModel, "base model only")],
)
def test_no_question_answering_head(tmp_path: Path, model: Any, held: str) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    extra = {"add_pooling_layer": False} if model is BertModel else {}
    model(config, **extra).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"no question-answering head.*{held}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_labels": 3}, "3 labels"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_unsupported_configurations(bert: Path, changes: dict[str, Any], named: str) -> None:
    edit_config(bert, **changes)
    with pytest.raises(UnsupportedModelError, match=named):
        load(bert)


def test_missing_directory_and_files(bert: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model directory"):
        load(bert / "nowhere")
    (bert / WEIGHTS).rename(bert / "kept")
    with pytest.raises(CheckpointError, match="no weights"):
        load(bert)
    (bert / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pickle.*Convert it.*save_pretrained"):
        load(bert)
    (bert / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(bert)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"model_type": "bert", "hidden_size": "x"}']
)
def test_broken_config(bert: Path, content: bytes) -> None:
    (bert / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="config"):
        load(bert)


def test_missing_tensors_are_named(bert: Path) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    edit_tensors(bert, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(bert)
    # A stage that does not need it is not affected.
    load(bert, LayerRange(0, 1))


def test_wrong_shapes_are_named(bert: Path) -> None:
    edit_config(bert, intermediate_size=48)
    with pytest.raises(CheckpointError, match=r"another shape.*is \[64, 16\], expected \[48, 16\]"):
        load(bert)


def test_integer_tensors(bert: Path) -> None:
    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        name = "bert.encoder.layer.0.output.dense.weight"
        tensors[name] = tensors[name].to(torch.int8)

    edit_tensors(bert, quantise)
    with pytest.raises(UnsupportedModelError, match="not floating-point"):
        load(bert)


def _header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[: len(data) // 2],
        lambda data: struct.pack("<Q", 1 << 62) + data[8:],
        lambda data: data[:8] + b"\xff" + data[9:],
        lambda data: _header(b"[]"),
        lambda data: _header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}    '),
        lambda data: _header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'),
        lambda data: _header(b'{"a": 3}'),
        lambda data: _header(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}'),
    ],
)
def test_damaged_safetensors(bert: Path, damage: Callable[[bytes], bytes]) -> None:
    file = bert / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"damaged or incomplete.*download it again"):
        load(bert)


def test_index_with_missing_or_foreign_files(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "bert", max_shard_size=40_000, tokenizer=False)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, value = next(iter(content["weight_map"].items()))
    for foreign, message in (("../x.safetensors", "beside the index"), ("x.bin", "beside the")):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {name: foreign}}))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)
    wrong = sorted(set(content["weight_map"].values()) - {value})[0]
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {name: wrong}}))
    with pytest.raises(CheckpointError, match="different downloads"):
        load(tmp_path)
    index.write_text(json.dumps(content))
    (tmp_path / value).unlink()
    with pytest.raises(CheckpointError, match=f"missing: {value}"):
        load(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        load(tmp_path)


def test_legacy_layer_norm_names(bert: Path) -> None:
    ids = torch.arange(5)
    expected = load(bert).run(StageBatch([5], ids))

    def age(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "LayerNorm" in name]:
            old = name.replace(".weight", ".gamma").replace(".bias", ".beta")
            tensors[old] = tensors.pop(name)

    edit_tensors(bert, age)
    assert torch.equal(load(bert).run(StageBatch([5], ids)), expected)


def test_layers_dtypes_and_devices_that_are_not_there(bert: Path) -> None:
    with pytest.raises(PartitionError, match="the model has 2"):
        load(bert, LayerRange(1, 3))
    with pytest.raises(ValueError, match="not a dtype"):
        StageModel.load(bert, dtype="int4", device="cpu")
    with pytest.raises(ValueError, match="float16 is not computed on CPUs"):
        StageModel.load(bert, dtype="float16", device="cpu")
    with pytest.raises(ValueError, match="not a device"):
        StageModel.load(bert, device="gpu")
    with pytest.raises(ValueError, match="CUDA devices"):
        StageModel.load(bert, device="cuda:99")


def test_batches_that_do_not_fit(bert: Path) -> None:
    first, last = load(bert, LayerRange(0, 1)), load(bert, LayerRange(1, 2))
    ids = torch.tensor([1, 2, 3])
    hidden = torch.zeros(3, 16)
    for batch, message in (
        (StageBatch([], ids), "no sequence"),
        (StageBatch([3, 0], ids), "0 to 3 tokens"),
        (StageBatch([513], ids), "takes 1 to 512"),
        (StageBatch([2], ids), r"lengths call for \[2\]"),
        (StageBatch([3], ids * 1000), "range from 1000 to 3000"),
        (StageBatch([3], -ids), "range from -3"),
        (StageBatch([3], ids, ids), "token_type_ids range from 1 to 3"),
        (StageBatch([3], hidden=hidden), "takes input_ids"),
    ):
        with pytest.raises(BatchError, match=message):
            first.run(batch)
    for batch, message in (
        (StageBatch([3], ids), "takes hidden"),
        (StageBatch([4], hidden=hidden), r"call for \[4, 16\]"),
        (StageBatch([3], hidden=torch.zeros(3, 15)), r"call for \[3, 16\]"),
    ):
        with pytest.raises(BatchError, match=message):
            last.run(batch)
    with pytest.raises(BatchError, match="has no head"):
        first.head(hidden)
    with pytest.raises(BatchError, match="does not embed"):
        last.embed(ids, None, [3])
