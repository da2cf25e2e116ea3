"""Models that read question and passage apart in their first layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering

from miaotui.explain.stage import ExplainStage
from miaotui.models.decomposed import PassageCache, divide, passage_key
from miaotui.models.errors import PartitionError, UnsupportedModelError
from miaotui.models.layers import LayerRange
from miaotui.models.partition import check_layers, parse_layers, plan_stages
from miaotui.models.stage import StageBatch, StageModel
from tests.checkpoints import decomposed, make_checkpoint, random_sequences
from tests.models.conftest import LAYERS

APART = 2
# (tokens of the question, of the passage); the third has no passage, the fifth no question.
SIZES = ((5, 30), (9, 100), (12, 0), (5, 30), (0, 17), (1, 1), (40, 300))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return decomposed(make_checkpoint(tmp_path / "model", "bert", layers=LAYERS), APART)


@pytest.fixture
def batch(model: Path) -> StageBatch:
    lengths = [sum(size) for size in SIZES]
    ids = torch.cat(random_sequences(AutoConfig.from_pretrained(model), lengths, seed=1))
    types = torch.cat([torch.arange(sum(size)) >= size[0] for size in SIZES]).long()
    return StageBatch(lengths, ids, types)


def reference(directory: Path, batch: StageBatch) -> torch.Tensor:
    """Span logits by transformers' own layers: one sequence at a time, the parts masked."""
    qa: Any = AutoModelForQuestionAnswering.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()
    assert batch.input_ids is not None
    assert batch.token_type_ids is not None
    rows = []
    begin = 0
    for question, passage in SIZES:
        end = begin + question + passage
        ids, types = batch.input_ids[None, begin:end], batch.token_type_ids[None, begin:end]
        positions = torch.cat([torch.arange(question), torch.arange(passage)])[None]
        apart = torch.where(types[0, :, None] == types[0], 0.0, torch.finfo(torch.float32).min)
        with torch.no_grad():
            hidden = qa.bert.embeddings(ids, token_type_ids=types, position_ids=positions)
            for index, layer in enumerate(qa.bert.encoder.layer):
                mask = apart[None, None] if index < APART else None
                hidden = layer(hidden, mask)
            rows.append(qa.qa_outputs(hidden)[0])
        begin = end
    return torch.cat(rows)


def run(directory: Path, split: str, batch: StageBatch, cache: int = 0) -> torch.Tensor:
    hidden = None
    for part in split.split(","):
        stage = StageModel.load(
            directory, LayerRange.parse(part), device="cpu", passage_cache_bytes=cache
        )
        given = batch if hidden is None else StageBatch(batch.lengths, hidden=hidden)
        hidden = stage.run(given)
    assert hidden is not None
    return hidden


@pytest.mark.parametrize("split", ["0-4", "0-3,3-4", "0-2,2-4", "0-2,2-3,3-4"])
@pytest.mark.parametrize("cache", [0, 1 << 24])
def test_equals_transformers_layers_with_the_parts_masked(
    model: Path, batch: StageBatch, split: str, cache: int
) -> None:
    logits = run(model, split, batch, cache)
    torch.testing.assert_close(logits, reference(model, batch), atol=1e-4, rtol=0)


def test_the_parts_do_not_see_each_other(model: Path, batch: StageBatch) -> None:
    """Otherwise the equality above would say little."""
    whole = make_checkpoint(model.parent / "whole", "bert", layers=LAYERS)
    logits = run(whole, "0-4", batch)
    assert not torch.allclose(logits, reference(model, batch), atol=1e-2)


def test_what_is_kept_of_a_passage_serves_other_questions(model: Path, batch: StageBatch) -> None:
    stage = StageModel.load(model, device="cpu", passage_cache_bytes=1 << 24)
    cache = stage.passages
    assert cache is not None
    first = stage.run(batch)
    assert (cache.hits, cache.misses, len(cache)) == (0, 6, 6)
    torch.testing.assert_close(stage.run(batch), first, atol=1e-5, rtol=0)
    assert (cache.hits, cache.misses) == (6, 6)
    # Another question on the second passage, which alone is long enough to tell.
    assert batch.input_ids is not None
    assert batch.token_type_ids is not None
    begin = sum(batch.lengths[:1])
    ids = batch.input_ids[begin : begin + 109].clone()
    ids[:9] = ids[:9].flip(0)
    other = StageBatch([109], ids, batch.token_type_ids[begin : begin + 109])
    found = stage.run(other)
    assert (cache.hits, cache.misses) == (7, 6)
    fresh = StageModel.load(model, device="cpu").run(other)
    torch.testing.assert_close(found, fresh, atol=1e-5, rtol=0)
    assert not torch.allclose(found, first[begin : begin + 109], atol=1e-3)


def test_a_passage_is_computed_once_in_a_batch(model: Path, batch: StageBatch) -> None:
    assert batch.input_ids is not None
    assert batch.token_type_ids is not None
    ids, types = batch.input_ids[:35], batch.token_type_ids[:35]
    changed = torch.cat([ids[:5].flip(0), ids[5:]])
    twice = StageBatch([35, 35], torch.cat([ids, changed]), torch.cat([types, types]))
    stage = StageModel.load(model, device="cpu", passage_cache_bytes=1 << 24)
    logits = stage.run(twice)
    assert stage.passages is not None
    assert (stage.passages.hits, stage.passages.misses) == (1, 1)
    plain = StageModel.load(model, device="cpu").run(twice)
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=0)


def test_salts_share_nothing(model: Path, batch: StageBatch) -> None:
    assert batch.input_ids is not None
    assert batch.token_type_ids is not None
    stage = StageModel.load(model, device="cpu", passage_cache_bytes=1 << 24)
    assert stage.passages is not None
    ids, types = batch.input_ids[:35], batch.token_type_ids[:35]
    for salt, hits in ((b"a", 0), (b"b", 0), (b"", 0), (b"a", 1)):
        stage.run(StageBatch([35], ids, types, salts=[salt]))
        assert stage.passages.hits == hits, salt
    # Nor where a salt's bytes could be taken for a token's.
    assert passage_key(b"\1\0\0\0", ids) != passage_key(b"", torch.cat([torch.ones(1), ids]))


def test_passages_of_other_token_types_are_others(model: Path, batch: StageBatch) -> None:
    assert batch.input_ids is not None
    stage = StageModel.load(model, device="cpu", passage_cache_bytes=1 << 24)
    assert stage.passages is not None
    ids, types = batch.input_ids[:35], torch.ones(35, dtype=torch.long)
    mixed = types.clone()
    mixed[20:] = 0
    first = stage.run(StageBatch([35], ids, types))
    second = stage.run(StageBatch([35], ids, mixed))
    assert (stage.passages.hits, stage.passages.misses) == (0, 2)
    plain = StageModel.load(model, device="cpu").run(StageBatch([35], ids, mixed))
    torch.testing.assert_close(second, plain, atol=1e-5, rtol=0)
    assert not torch.allclose(first, second, atol=1e-3)


def test_the_cache_keeps_to_its_budget_and_to_what_was_used_last() -> None:
    cache = PassageCache(3 * 400)
    rows = [torch.full((10, 10), float(number)) for number in range(4)]
    for number in range(3):
        cache.put(bytes([number]), rows[number])
    assert cache.get(b"\0") is not None
    cache.put(b"\3", rows[3])
    assert cache.get(b"\1") is None
    assert [cache.get(bytes([n])) is not None for n in (0, 2, 3)] == [True] * 3
    assert cache.held_bytes == 1200
    cache.put(b"\4", torch.zeros(40, 10))
    assert cache.get(b"\4") is None
    assert len(cache) == 3
    cache.put(b"\0", torch.zeros(5, 10))
    assert cache.held_bytes == 1000


@pytest.mark.parametrize(
    ("lengths", "types", "expected"),
    [
        ((4,), None, [(0, 4, False)]),
        ((2, 3), "00111", [(0, 2, False), (2, 5, True)]),
        ((4, 1, 3), "00110011", [(0, 2, False), (2, 4, True), (4, 5, False), (5, 6, False),
                                 (6, 8, True)]),
        # A type 0 after the passage has begun is the passage's.
        ((4,), "0101", [(0, 1, False), (1, 4, True)]),
        ((2, 2), "1100", [(0, 2, True), (2, 4, False)]),
    ],
)  # fmt: skip
def test_sequences_divide_where_the_type_changes(
    lengths: Sequence[int], types: str | None, expected: list[tuple[int, int, bool]]
) -> None:
    given = None if types is None else torch.tensor([int(kind) for kind in types])
    parts = divide(lengths, given)
    assert [(part.begin, part.end, part.passage) for part in parts] == expected


def test_the_first_stage_holds_all_such_layers(model: Path) -> None:
    for stages in (1, 2, 3):
        plan = plan_stages(model, stages)
        assert plan.stages[0].layers.end >= APART
        assert len(plan.stages) == stages
    with pytest.raises(PartitionError, match="first 2 of which stay together, splits into 1 to 3"):
        plan_stages(model, 4)
    with pytest.raises(PartitionError, match="0-2 at least"):
        plan_stages(model, parse_layers("0-1,1-4"))
    check_layers(parse_layers("0-1,1-4"), LAYERS)  # nothing else is wrong with these
    for held in ("0-1", "1-4"):
        with pytest.raises(PartitionError, match="0-2 at least"):
            StageModel.load(model, LayerRange.parse(held), device="cpu")


def test_models_that_cannot_tell_the_parts_are_refused(tmp_path: Path) -> None:
    roberta = decomposed(make_checkpoint(tmp_path / "roberta", "roberta", layers=LAYERS), APART)
    with pytest.raises(UnsupportedModelError, match="token types"):
        StageModel.load(roberta, device="cpu")
    for count in (LAYERS, LAYERS + 1, -1, "2"):
        bert = make_checkpoint(tmp_path / f"bert{count}", "bert", layers=LAYERS)
        with pytest.raises(UnsupportedModelError, match="1 to 3"):
            StageModel.load(decomposed(bert, count), device="cpu")  # type: ignore[arg-type]


def test_it_has_a_fingerprint_of_its_own_and_is_not_explained(model: Path) -> None:
    whole = make_checkpoint(model.parent / "whole", "bert", layers=LAYERS)
    apart = StageModel.load(model, device="cpu")
    assert apart.info.fingerprint != StageModel.load(whole, device="cpu").info.fingerprint
    with pytest.raises(UnsupportedModelError, match="reads questions and passages apart"):
        ExplainStage(apart)
