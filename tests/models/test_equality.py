"""A split, packed model computes what transformers' unsplit, unpadded one does."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from miaotui.models import attention, packed
from miaotui.models.attention import PackedSequences, attend_runs
from miaotui.models.layers import LayerRange
from miaotui.models.packed import LinearPart, PackedLinear, rounded_rows
from miaotui.models.product_attention import attend_by_products
from miaotui.models.stage import StageBatch, StageModel
from tests.checkpoints import EXAMPLES, FAMILIES, make_checkpoint, random_sequences
from tests.models.conftest import LAYERS

# Runs of equal neighbours, single tokens, the longest sequence, repeats far apart.
LENGTHS = (1, 7, 7, 33, 512, 5, 5, 5, 100, 7, 1)
SPLITS: dict[int, str] = {1: "0-4", 2: "0-3,3-4", 3: "0-1,1-3,3-4", 4: "0-1,1-2,2-3,3-4"}


def reference(
    directory: Path,
    sequences: Sequence[torch.Tensor],
    types: Sequence[torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Span logits [tokens, 2] of transformers' model, one unpadded sequence at a time."""
    model = AutoModelForQuestionAnswering.from_pretrained(directory, dtype=dtype).eval()
    rows = []
    for index, ids in enumerate(sequences):
        extra = {} if types is None else {"token_type_ids": types[index][None]}
        with torch.no_grad():
            output = model(
                input_ids=ids[None],
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                **extra,
            )
        rows.append(torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1))
    return torch.cat(rows).float()


def split_run(
    directory: Path,
    split: str,
    sequences: Sequence[torch.Tensor],
    types: Sequence[torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Span logits of the stages one after another, on all sequences packed into one batch."""
    lengths = [len(ids) for ids in sequences]
    tensor = None
    for part in split.split(","):
        stage = StageModel.load(directory, LayerRange.parse(part), dtype=dtype, device="cpu")
        if tensor is None:
            joined = None if types is None else torch.cat(list(types))
            batch = StageBatch(lengths, torch.cat(list(sequences)), joined)
        else:
            batch = StageBatch(lengths, hidden=tensor)
        tensor = stage.run(batch)
    assert tensor is not None
    return tensor


def token_types(family: str, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    if family not in ("bert", "electra"):
        return None
    return [(torch.arange(len(ids)) >= len(ids) // 3).long() for ids in sequences]


@pytest.mark.parametrize("stages", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_split_and_packed_equals_unsplit(
    checkpoints: dict[str, Path], family: str, stages: int
) -> None:
    directory = checkpoints[family]
    config = StageModel.load(directory, device="cpu").shape
    sequences = random_sequences(config, LENGTHS)  # over the whole vocabulary: padding ids too
    types = token_types(family, sequences)
    expected = reference(directory, sequences, types)
    result = split_run(directory, SPLITS[stages], sequences, types)
    assert result.dtype is torch.float32
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
    # Not vacuous: tokens' logits differ by far more than that.
    assert expected.std() > 0.1


@pytest.mark.parametrize("least", [0, 1 << 17])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_equal_transformers_modules(
    checkpoints: dict[str, Path], family: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 0: weights are packed, as those of real size are.
    monkeypatch.setattr(packed, "_PACKED_ELEMENTS", least)
    plain = StageModel.load(checkpoints[family], device="cpu", dtype="float32", fuse=False)
    fused = StageModel.load(checkpoints[family], device="cpu", dtype="float32")
    ids = torch.cat(random_sequences(plain.shape, LENGTHS))
    expected = plain.run(StageBatch(LENGTHS, ids))
    # No module is called any more ...
    for layer in fused._skeleton.layers:
        monkeypatch.setattr(type(layer), "forward", None)
    torch.testing.assert_close(fused.run(StageBatch(LENGTHS, ids)), expected, atol=1e-5, rtol=0)
    monkeypatch.undo()
    # ... but with parameters that are laid out anew, or unpacked, it would compute the same.
    assert any(isinstance(m, LinearPart) for m in fused._skeleton.root.modules()) == (not least)
    hidden = fused.embed(ids, None, LENGTHS)
    again = StageModel(fused._skeleton, fused.shape, fused.info, fuse=False)
    torch.testing.assert_close(
        again.head(again.layers(hidden, LENGTHS)), expected, atol=1e-5, rtol=0
    )


def test_few_numbers_of_rows_reach_the_kernels(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_PACKED_ELEMENTS", 0)
    plain = StageModel.load(checkpoints["bert"], device="cpu", dtype="float32", fuse=False)
    fused = StageModel.load(checkpoints["bert"], device="cpu", dtype="float32")
    rows: set[int] = set()
    forward = PackedLinear.forward

    def seen(self: PackedLinear, hidden: torch.Tensor, *activation: Any) -> torch.Tensor:
        rows.add(len(hidden))
        return forward(self, hidden, *activation)

    monkeypatch.setattr(PackedLinear, "forward", seen)
    # One sequence, equal ones, others, more than are computed at once; none of the sums is round.
    for lengths in ([33], [1], [7, 7, 7], [301], [20, 3, 20, 64], [37], [300, 301, 20]):
        ids = torch.cat(random_sequences(plain.shape, lengths))
        batch = StageBatch(lengths, ids)
        torch.testing.assert_close(fused.run(batch), plain.run(batch), atol=1e-5, rtol=0)
    assert rows == {8, 24, 40, 112, 304, 336}


def test_all_numbers_of_rows_are_rehearsed(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = StageModel.load(checkpoints["bert"], device="cpu", dtype="float32")
    assert not list(plain.rehearse())  # its products are too small to be packed
    monkeypatch.setattr(packed, "_PACKED_ELEMENTS", 0)
    stage = StageModel.load(checkpoints["bert"], device="cpu", dtype="float32")
    every = sorted({rounded_rows(tokens) for tokens in range(1, packed.MOST_ROWS + 1)})
    assert list(stage.rehearse()) == every


def test_rounded_rows() -> None:
    rounded = [rounded_rows(tokens) for tokens in range(1, 1025)]
    assert all(tokens <= rows for tokens, rows in enumerate(rounded, 1))
    assert all(rows - tokens <= max(7, tokens / 16) for tokens, rows in enumerate(rounded, 1))
    assert rounded == sorted(rounded)
    assert len(set(rounded)) == 64


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_hold_nothing_twice(checkpoints: dict[str, Path], family: str) -> None:
    stage = StageModel.load(checkpoints[family], device="cpu", dtype="float32")
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for p in stage._skeleton.root.parameters()
    }
    assert sum(storages.values()) == stage.info.parameter_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_real_text_equals_unsplit(checkpoints: dict[str, Path], family: str) -> None:
    directory = checkpoints[family]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoded = [tokenizer(question, context) for question, context in EXAMPLES]
    sequences = [torch.tensor(item["input_ids"]) for item in encoded]
    types = None
    if "token_type_ids" in encoded[0]:
        types = [torch.tensor(item["token_type_ids"]) for item in encoded]
        assert any(item.any() for item in types)
    expected = reference(directory, sequences, types)
    result = split_run(directory, "0-2,2-4", sequences, types)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_in_a_batch_do_not_matter(checkpoints: dict[str, Path], family: str) -> None:
    stage = StageModel.load(checkpoints[family], device="cpu")
    sequences = random_sequences(stage.shape, (20, 3, 20, 64), seed=3)
    together = stage.run(StageBatch([20, 3, 20, 64], torch.cat(sequences)))
    alone = torch.cat([stage.run(StageBatch([len(ids)], ids)) for ids in sequences])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta"])
def test_padding_ids_inside_a_text(checkpoints: dict[str, Path], family: str) -> None:
    pad = 1
    sequences = [
        torch.tensor([0, pad, pad, 9, 2]),
        torch.tensor([pad]),
        torch.tensor([0, 9, pad, 9, pad, 2, 2, 8, 2]),
    ]
    result = split_run(checkpoints[family], "0-1,1-4", sequences)
    torch.testing.assert_close(result, reference(checkpoints[family], sequences), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_near_transformers_own(checkpoints: dict[str, Path], family: str) -> None:
    directory = checkpoints[family]
    sequences = random_sequences(StageModel.load(directory, device="cpu").shape, (40, 12, 12))
    exact = reference(directory, sequences)
    ours = split_run(directory, "0-2,2-4", sequences, dtype=torch.bfloat16)
    theirs = reference(directory, sequences, dtype=torch.bfloat16)
    error, own_error = (ours - exact).abs().mean(), (theirs - exact).abs().mean()
    assert error < 0.06 * exact.std()
    # No worse than bfloat16 is in transformers itself, give or take rounding.
    assert error < 1.3 * own_error


def _attended(
    multiplied: bool, dtype: torch.dtype, lengths: tuple[int, ...], patch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, int]:
    """Attention of made-up sequences, and how many runs were attended by products."""
    calls = []

    def products(*args: Any) -> None:
        calls.append(args)
        attend_by_products(*args)

    patch.setattr(attention, "multiplies_bfloat16", lambda _device: multiplied)
    patch.setattr(attention, "attend_by_products", products)
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(sum(lengths), 3, 4, 24, generator=generator)
    query, key, value = inputs.permute(1, 2, 0, 3).unsqueeze(1)
    packed_lengths = PackedSequences.of(lengths, torch.device("cpu"))
    return attend_runs(query, key, value, packed_lengths, dtype=dtype), len(calls)


# Below, at and above a multiple of 32; several in a group; more than one group; alone.
@pytest.mark.parametrize("lengths", [(1, 31, 32, 33), (17,) * 9, (300,) * 5, (100,)])
def test_attention_by_products(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    exact, none = _attended(True, torch.float32, lengths, monkeypatch)
    ours, runs = _attended(True, torch.bfloat16, lengths, monkeypatch)
    assert (none, runs) == (0, len(set(lengths)))
    assert ours.dtype is torch.float32
    # Scores and weights are rounded to 8 bits.
    torch.testing.assert_close(ours, exact, atol=0.04, rtol=0)
    # Elsewhere it is torch's.
    again, none = _attended(False, torch.bfloat16, lengths, monkeypatch)
    assert none == 0
    assert torch.equal(again, exact)


@pytest.mark.parametrize("extreme", [90.0, -90.0, 1000.0, -1000.0])
def test_attention_by_products_of_extreme_scores(extreme: float) -> None:
    """Exponentials of scores as they are would be infinite, or 0: beside usual heads and texts."""
    count, length, heads, dim = 3, 40, 4, 32
    generator = torch.Generator().manual_seed(3)
    query, key, value = torch.randn(3, heads, count * length, dim, generator=generator).bfloat16()
    # In one head, and in the second text of another, all scores are great: by powers of 2,
    # so that rounding does not decide.
    one, two = query[1], query[2, length : 2 * length]
    for part, keys in ((one, key[1]), (two, key[2, length : 2 * length])):
        part.zero_()
        part[:, 0] = extreme
        keys[:, 0] = 1.0
        keys[::3, 0] = 0.5
    output = torch.empty(count * length, heads, dim)
    attend_by_products((query, key, value), count, length, 1.0, output)
    q, k, v = (x.float().unflatten(1, (count, length)) for x in (query, key, value))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    found = output.permute(1, 0, 2).unflatten(1, (count, length))
    assert torch.isfinite(found).all()
    # Scores of the usual heads are rounded to 8 bits before their exponential is taken.
    torch.testing.assert_close(found[1], exact[1], atol=0.03, rtol=0.01)
    torch.testing.assert_close(found[2, 1], exact[2, 1], atol=0.03, rtol=0.01)
    torch.testing.assert_close(found, exact, atol=0.2, rtol=0)


@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_bfloat16_answers_alike_either_way(
    checkpoints: dict[str, Path], family: str, multiplied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "multiplies_bfloat16", lambda _device: multiplied)
    monkeypatch.setattr(packed, "_PACKED_ELEMENTS", 0)
    directory = checkpoints[family]
    sequences = random_sequences(StageModel.load(directory, device="cpu").shape, (40, 12, 12, 90))
    exact = reference(directory, sequences)
    ours = split_run(directory, "0-2,2-4", sequences, dtype=torch.bfloat16)
    theirs = reference(directory, sequences, dtype=torch.bfloat16)
    error, own_error = (ours - exact).abs().mean(), (theirs - exact).abs().mean()
    assert error < 0.06 * exact.std()
    assert error < 1.3 * own_error


def test_every_stage_step_composes_to_run(checkpoints: dict[str, Path]) -> None:
    stage = StageModel.load(checkpoints["electra"], device="cpu")
    ids = random_sequences(stage.shape, (9,))[0]
    hidden = stage.layers(stage.embed(ids, None, [4, 5]), [4, 5])
    assert hidden.shape == (9, stage.info.hidden_size)
    assert torch.equal(stage.head(hidden), stage.run(StageBatch([4, 5], ids)))


def test_read_only_activations_are_left_alone(checkpoints: dict[str, Path]) -> None:
    stage = StageModel.load(checkpoints["bert"], LayerRange(1, LAYERS), device="cpu")
    hidden = torch.randn(8, stage.info.hidden_size)
    before = hidden.clone()
    stage.run(StageBatch([8], hidden=hidden))
    assert torch.equal(hidden, before)


def test_sharded_and_half_precision_checkpoints(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "one", "bert", layers=3)
    make_checkpoint(tmp_path / "many", "bert", layers=3, max_shard_size=40_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    sequences = random_sequences(StageModel.load(tmp_path / "one", device="cpu").shape, (6, 11))
    expected = split_run(tmp_path / "one", "0-1,1-2,2-3", sequences)
    assert torch.equal(split_run(tmp_path / "many", "0-1,1-2,2-3", sequences), expected)
    make_checkpoint(tmp_path / "half", "bert", layers=3, dtype=torch.float16)
    half = split_run(tmp_path / "half", "0-3", sequences)
    assert half.dtype is torch.float32
    torch.testing.assert_close(half, expected, atol=2e-2, rtol=0)


def test_models_with_unusual_dimensions(tmp_path: Path) -> None:
    """head_dim not a power of two, one head, one layer."""
    make_checkpoint(tmp_path, "distilbert", layers=1, hidden=21, heads=1, max_length=40)
    sequences = random_sequences(StageModel.load(tmp_path, device="cpu").shape, (40, 2, 2))
    torch.testing.assert_close(
        split_run(tmp_path, "0-1", sequences), reference(tmp_path, sequences), atol=1e-4, rtol=0
    )


def test_varlen_kernel_is_called_as_it_asks(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA path's arithmetic around the kernel, with a stand-in for the kernel itself."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(*args, **kwargs).arguments
        query, key, value, offsets = (given[n] for n in ("query", "key", "value", "cu_seq_q"))
        assert given["cu_seq_k"] is offsets
        assert offsets.dtype is torch.int32
        assert query.is_contiguous()
        lengths = offsets.diff().tolist()
        assert given["max_q"] == given["max_k"] == max(lengths)
        parts = [tensor.transpose(0, 1).split(lengths, 1) for tensor in (query, key, value)]
        done = [
            torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=given["scale"])
            for q, k, v in zip(*parts, strict=True)
        ]
        return torch.cat(done, 1).transpose(0, 1)

    stage = StageModel.load(checkpoints["bert"], device="cpu", dtype="float32", fuse=False)
    ids = torch.cat(random_sequences(stage.shape, (5, 17, 5)))
    expected = stage.run(StageBatch([5, 17, 5], ids))
    monkeypatch.setattr(attention, "_varlen_attention", stand_in)
    monkeypatch.setattr(attention, "_fits_varlen", lambda query: True)
    torch.testing.assert_close(stage.run(StageBatch([5, 17, 5], ids)), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.15)])
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_equals_cpu(
    checkpoints: dict[str, Path], family: str, dtype: str, tolerance: float
) -> None:
    exact = StageModel.load(checkpoints[family], device="cpu", dtype="float32")
    on_gpu = StageModel.load(checkpoints[family], device="cuda", dtype=dtype)
    ids = torch.cat(random_sequences(exact.shape, LENGTHS))
    result = on_gpu.run(StageBatch(LENGTHS, ids)).cpu()
    torch.testing.assert_close(result, exact.run(StageBatch(LENGTHS, ids)), atol=tolerance, rtol=0)
