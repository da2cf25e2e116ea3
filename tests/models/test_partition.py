"""Plans are optimal, ranges are checked, and a stage's memory is its share."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaotui.models.costs import ModelCosts, estimate_costs, measure_costs
from miaotui.models.errors import PartitionError
from miaotui.models.layers import LayerRange
from miaotui.models.partition import check_layers, parse_layers, partition_layers, plan_stages
from miaotui.models.stage import StageModel
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.models.conftest import LAYERS

numbers = st.floats(0.01, 100, allow_nan=False)
costs_of_layers = st.lists(numbers, min_size=1, max_size=8)


@given(layers=costs_of_layers, embeddings=numbers, head=numbers, data=st.data())
def test_plans_are_as_good_as_brute_force(
    layers: list[float], embeddings: float, head: float, data: st.DataObject
) -> None:
    costs = ModelCosts(embeddings, tuple(layers), head, "s")
    stages = data.draw(st.integers(1, len(layers)))
    planned = [costs.of(part) for part in partition_layers(costs, stages)]
    others = []
    for inner in itertools.combinations(range(1, len(layers)), stages - 1):
        cuts = (0, *inner, len(layers))
        others.append([costs.of(LayerRange(*pair)) for pair in itertools.pairwise(cuts)])
    worst = min(max(other) for other in others)
    assert max(planned) == pytest.approx(worst)
    squares = min(sum(c * c for c in other) for other in others if max(other) <= worst * 1.000001)
    assert sum(c * c for c in planned) == pytest.approx(squares, rel=1e-5)


def test_equal_layers_are_spread_evenly() -> None:
    costs = ModelCosts(0.0, (1.0,) * 12, 0.0, "s")
    for stages in range(1, 13):
        sizes = [len(part) for part in partition_layers(costs, stages)]
        assert max(sizes) - min(sizes) <= 1


def test_heavy_embeddings_relieve_the_first_stage() -> None:
    costs = ModelCosts(2.0, (1.0,) * 6, 0.0, "s")
    assert parse_layers("0-2,2-6") == partition_layers(costs, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_accounts_for_every_byte(checkpoints: dict[str, Path], family: str) -> None:
    directory = checkpoints[family]
    for count in range(1, LAYERS + 1):
        plan = plan_stages(directory, count, dtype="float32", device="cpu")
        assert len(plan.stages) == count
        assert sum(stage.cost_share for stage in plan.stages) == pytest.approx(1)
        assert 0 < plan.balance <= 1
        for stage in plan.stages:
            info = StageModel.load(directory, stage.layers, dtype="float32", device="cpu").info
            assert info.parameter_bytes == stage.parameter_bytes
            assert info.model_parameter_bytes == plan.parameter_bytes
            assert info.is_first == (stage.index == 0)
            assert info.is_last == (stage.index == count - 1)


def test_explicit_ranges_are_costed(checkpoints: dict[str, Path]) -> None:
    plan = plan_stages(checkpoints["bert"], parse_layers("0-1,1-4"), dtype="bfloat16")
    assert [str(stage.layers) for stage in plan.stages] == ["0-1", "1-4"]
    assert plan.bottleneck.index == 1
    assert plan.dtype == "bfloat16"


def test_measured_costs_plan_too(checkpoints: dict[str, Path]) -> None:
    costs = measure_costs(checkpoints["electra"], dtype="float32", device="cpu", repeats=1)
    assert costs.unit == "s"
    assert len(plan_stages(checkpoints["electra"], 2, costs=costs).stages) == 2
    with pytest.raises(PartitionError, match="costs of 4 layers"):
        plan_stages(make_two_layers(checkpoints), 2, costs=costs)


def make_two_layers(checkpoints: dict[str, Path]) -> Path:
    return make_checkpoint(checkpoints["bert"].parent / "two", "bert", layers=2, tokenizer=False)


def test_estimated_layers_dominate_in_a_real_model() -> None:
    from transformers import BertConfig

    from miaotui.models.families import FAMILIES as families

    costs = estimate_costs(families["bert"].shape(BertConfig()))
    assert len(costs.layers) == 12
    assert costs.embeddings < 0.1 * costs.layers[0]
    assert costs.head < 0.01 * costs.layers[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a layer range"),
        ("3", "not a layer range"),
        ("a-b", "not a layer range"),
        ("0-3;3-6", "not a layer range"),
        ("-1-3", "not a layer range"),
        ("0-0", "empty"),
        ("3-1", "empty"),
        ("1-3", "must begin at layer 0"),
        ("0-3,4-6", "leaves a gap"),
        ("0-3,2-6", "overlaps"),
    ],
)
def test_malformed_ranges(text: str, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        parse_layers(text)


def test_ranges_that_do_not_cut_the_model(checkpoints: dict[str, Path]) -> None:
    assert parse_layers(" 0-3, 3-6 ") == [LayerRange(0, 3), LayerRange(3, 6)]
    with pytest.raises(PartitionError, match="end at layer 3, the model has 4"):
        plan_stages(checkpoints["bert"], parse_layers("0-3"))
    with pytest.raises(PartitionError, match="no layer ranges"):
        check_layers([], 4)
    for stages in (0, 5, -1):
        with pytest.raises(PartitionError, match="splits into 1 to 4"):
            plan_stages(checkpoints["bert"], stages)


MEASURE = """
import sys, psutil
from miaotui.models.layers import LayerRange
from miaotui.models.stage import StageModel
big, small = sys.argv[1:]
StageModel.load(small, device="cpu").warm_up()  # libraries and lazy imports
held = []
for layers in (LayerRange(2, 4), LayerRange(0, 8)):
    before = psutil.Process().memory_info().rss
    held.append(StageModel.load(big, layers, dtype="float32", device="cpu"))
    info = held[-1].info
    print(psutil.Process().memory_info().rss - before, info.parameter_bytes,
          info.model_parameter_bytes)
"""


def test_a_stages_memory_is_its_share(tmp_path: Path) -> None:
    big = make_checkpoint(
        tmp_path / "big", "bert", layers=8, hidden=512, heads=8, max_shard_size="30MB"
    )
    small = make_checkpoint(tmp_path / "small", "bert", layers=1)
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, big, small], check=True, capture_output=True, text=True
    ).stdout
    shares = []
    for line in output.splitlines():
        resident, parameters, whole = map(int, line.split())
        # Resident memory grows by the stage's parameters; slack for the allocator.
        assert 0.9 * parameters < resident < 1.15 * parameters + 4_000_000
        shares.append(parameters / whole)
    assert shares[0] < 0.27
    assert shares[1] == 1
