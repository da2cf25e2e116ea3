"""A split encoder's vectors are transformers' states, averaged over a sequence's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from miaotui.models.errors import UnsupportedModelError
from miaotui.models.layers import LayerRange
from miaotui.models.loading import load_stage
from miaotui.models.partition import plan_stages
from miaotui.models.stage import StageBatch, StageModel
from tests.checkpoints import FAMILIES, random_sequences

LENGTHS = (1, 7, 33, 7, 100, 2)


@pytest.fixture
def bare(checkpoints: dict[str, Path], tmp_path: Path, family: str) -> Path:
    """The family's model without any head, as sentence encoders are published."""
    model = AutoModel.from_pretrained(checkpoints[family])
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoints[family]).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_equal_transformers(family: str, bare: Path) -> None:
    reference = AutoModel.from_pretrained(bare, dtype=torch.float32).eval()
    shape = load_stage(bare, LayerRange(0, 1), device="cpu", task="embed").shape
    sequences = random_sequences(shape, LENGTHS)
    with torch.no_grad():
        states = [reference(input_ids=ids[None]).last_hidden_state[0] for ids in sequences]
    means = torch.stack([state.mean(0) for state in states])
    expected = torch.nn.functional.normalize(means, dim=1)
    for count in (1, 2, 3):
        tensor = None
        for plan in plan_stages(bare, count, device="cpu", task="embed").stages:
            stage = StageModel.load(bare, plan.layers, device="cpu", dtype="float32", task="embed")
            assert stage.info.kind == "embedding"
            ids = torch.cat(list(sequences)) if tensor is None else None
            tensor = stage.run(StageBatch(LENGTHS, input_ids=ids, hidden=tensor))
        assert tensor is not None
        torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert"])
def test_without_being_asked_it_is_refused_by_default(family: str, bare: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="MIAOTUI_SHARD_TASK=embed"):
        load_stage(bare, device="cpu")
