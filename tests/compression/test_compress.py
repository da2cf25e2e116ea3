"""Compressed checkpoints: served alike in any number of stages, near to what they were made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from miaotui.compression import CompressionError, compress_model
from miaotui.compression.factorize import decompose, low_rank
from miaotui.compression.methods import parse_method
from miaotui.compression.prune import (
    keep_heads,
    keep_neurons,
    prune_two_of_four,
    sensitivity,
)
from miaotui.compression.questions import labelled_batches, read_examples, stage_batch
from miaotui.compression.recover import recover
from miaotui.compression.workspace import Workspace
from miaotui.models.checkpoint import Checkpoint, read_config
from miaotui.models.compressed import BLOCK, Int8Linear, PackedLinear, compressed_modules
from miaotui.models.errors import CheckpointError
from miaotui.models.fingerprint import model_fingerprint
from miaotui.models.integer import largest_weight, narrow
from miaotui.models.layers import LayerRange
from miaotui.models.partition import plan_stages
from miaotui.models.stage import StageBatch, StageModel
from miaotui.text.tokenizer import load_tokenizer
from tests.checkpoints import FAMILIES, make_checkpoint, random_sequences

LENGTHS = (5, 33, 33, 70)
METHODS = (
    "int8",
    "int8-static",
    "int4",
    "int3-static",
    "prune-weights=0.5",
    "prune-2:4",
    "prune-heads=0.4,prune-neurons=0.3",
    "prune-layers=1,int8-static",
    "svd=0.6",
    "asvd=0.6,int8-static",
    "prune-heads=0.3,svd=0.7,int8",
    "words=4",
    "words=2,int8-static",
)


def run(directory: Path, split: str) -> torch.Tensor:
    """Span logits of the stages of a split, one after another."""
    tensor = None
    for part in split.split(","):
        stage = StageModel.load(directory, LayerRange.parse(part), device="cpu", dtype="float32")
        if tensor is None:
            ids = torch.cat(random_sequences(stage.shape, LENGTHS))
            tensor = stage.run(StageBatch(LENGTHS, ids))
        else:
            tensor = stage.run(StageBatch(LENGTHS, hidden=tensor))
    assert tensor is not None
    return tensor


def round_for_this_cpu(root: nn.Module) -> None:
    """Give modules the weights that the kernels get: of fewer bits without VNNI."""
    largest = largest_weight()
    assert largest is not None
    for name, module in list(root.named_modules()):
        if isinstance(module, Int8Linear | PackedLinear):
            rounded = module.as_int8()
            narrow(rounded, largest)
            root.set_submodule(name, rounded)


def compress(model: Path, out: Path, method: str, questions: Path | None = None) -> Path:
    needed = any(step.needs_questions for step in parse_method(method))
    files = [questions] if needed and questions is not None else []
    compress_model(model, out, method=method, calibrate=files)
    return out


@pytest.mark.parametrize("method", METHODS)
def test_split_equals_unsplit(model: Path, questions: Path, tmp_path: Path, method: str) -> None:
    made = compress(model, tmp_path / "made", method, questions)
    layers = read_config(made)["num_hidden_layers"]
    whole = run(made, f"0-{layers}")
    assert torch.isfinite(whole).all()
    assert torch.equal(run(made, f"0-1,1-{layers}"), whole)
    if layers == 3:
        assert torch.equal(run(made, "0-1,1-2,2-3"), whole)
    assert model_fingerprint(made) != model_fingerprint(model)


@pytest.mark.parametrize("method", ["int8", "int8-static", "svd=0.6,int8-static", "int5"])
def test_kernels_compute_what_the_modules_say(
    model: Path, questions: Path, tmp_path: Path, method: str
) -> None:
    """Integer kernels against float arithmetic on rounded numbers.

    They may differ where a value lies on the border of two codes, by next to nothing elsewhere.
    """
    made = compress(model, tmp_path / "made", method, questions)
    fused = run(made, "0-3")
    stage = StageModel.load(made, device="cpu", dtype="float32", fuse=False)
    for layer in stage.skeleton.layers:
        round_for_this_cpu(layer)
    ids = torch.cat(random_sequences(stage.shape, LENGTHS))
    plain = stage.run(StageBatch(LENGTHS, ids))
    difference = (fused - plain).abs()
    assert difference.median() < 2e-3
    assert difference.max() < 0.3


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        ("int8", 0.06),
        ("int8-static", 0.08),
        ("int6", 0.15),
        ("int4", 0.6),
        ("words=8,int8", 0.06),
        ("words=4", 0.2),
        ("words=2", 0.6),
    ],
)
def test_rounding_error_is_bounded(
    model: Path, questions: Path, tmp_path: Path, method: str, bound: float
) -> None:
    made = compress(model, tmp_path / "made", method, questions)
    examples = read_examples([questions], load_tokenizer(model), limit=7)
    batch = stage_batch([window for example in examples for window in example.windows])
    exact, found = (
        StageModel.load(directory, device="cpu", dtype="float32").run(batch)
        for directory in (model, made)
    )
    error = (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < bound


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path: Path, family: str) -> None:
    model = make_checkpoint(tmp_path / family, family, layers=2, hidden=32, seed=1)
    made = compress(model, tmp_path / "made", "int8")
    exact, whole = run(model, "0-2"), run(made, "0-2")
    assert torch.equal(run(made, "0-1,1-2"), whole)
    assert (whole - exact).square().mean().sqrt() < 0.1 * exact.square().mean().sqrt()


def test_answers_do_not_depend_on_the_batch(model: Path, questions: Path, tmp_path: Path) -> None:
    for method in ("int8", "int8-static"):
        made = compress(model, tmp_path / method, method, questions)
        stage = StageModel.load(made, device="cpu", dtype="float32")
        first, second = random_sequences(stage.shape, (20, 77))
        together = stage.run(StageBatch([20, 77], torch.cat([first, second])))
        assert torch.equal(stage.run(StageBatch([20], first)), together[:20])


def test_stages_hold_codes_and_only_their_own(model: Path, tmp_path: Path) -> None:
    made = compress(model, tmp_path / "made", "int8")
    plan = plan_stages(made, 3, dtype="float32", device="cpu")
    sizes = []
    for stage in plan.stages:
        loaded = StageModel.load(made, stage.layers, device="cpu", dtype="float32")
        assert loaded.info.parameter_bytes == stage.parameter_bytes
        sizes.append(loaded.info.parameter_bytes)
    whole = StageModel.load(model, device="cpu", dtype="float32").info.parameter_bytes
    assert sum(sizes) < 0.4 * whole
    assert (
        sizes[1]
        < 0.3
        * StageModel.load(
            model, LayerRange(1, 2), device="cpu", dtype="float32"
        ).info.parameter_bytes
    )
    stored = Checkpoint.open(made).tensors
    assert stored["bert.encoder.layer.0.output.dense.weight"].dtype == "I8"


def test_int4_is_stored_in_four_bits(model: Path, tmp_path: Path) -> None:
    entries = Checkpoint.open(compress(model, tmp_path / "made", "int4")).tensors
    entry = entries["bert.encoder.layer.1.intermediate.dense.weight"]
    assert (entry.dtype, entry.shape) == ("U8", (256, 32))


def test_pruned_units_are_as_if_zero(model: Path, tmp_path: Path) -> None:
    """Taking heads and neurons out equals the model with their outputs at 0."""
    workspace = Workspace.open(model)
    keep_heads(workspace, 0, [1, 3])
    keep_heads(workspace, 2, [0])
    keep_neurons(workspace, 1, range(0, 256, 2))
    workspace.save(tmp_path / "cut", ["cut"], {})
    zeroed = Workspace.open(model)
    width = zeroed.head_dim
    with torch.no_grad():
        for layer, gone in ((0, (0, 2)), (2, (1, 2, 3))):
            for head in gone:
                part = slice(head * width, (head + 1) * width)
                zeroed.parts(layer).attention_out.weight[:, part] = 0
        zeroed.parts(1).down.weight[:, 1::2] = 0
    zeroed.save(tmp_path / "zeroed", ["zeroed"], {})
    cut, expected = run(tmp_path / "cut", "0-3"), run(tmp_path / "zeroed", "0-3")
    torch.testing.assert_close(cut, expected, atol=1e-4, rtol=0)
    assert torch.equal(run(tmp_path / "cut", "0-1,1-3"), cut)
    small = StageModel.load(tmp_path / "cut", device="cpu").info.parameter_bytes
    assert small < StageModel.load(tmp_path / "zeroed", device="cpu").info.parameter_bytes


def test_sparse_weights(model: Path, questions: Path, tmp_path: Path) -> None:
    for method, share in (("prune-2:4", 0.5), ("prune-weights=0.7", 0.7)):
        made = Workspace.open(compress(model, tmp_path / method[:9], method, questions))
        weights = [m.weight for _, _, m in made.linears() if isinstance(m, torch.nn.Linear)]
        zeros = sum(w.numel() - int(w.count_nonzero()) for w in weights) / sum(
            w.numel() for w in weights
        )
        assert zeros == pytest.approx(share, abs=0.01)
        if method == "prune-2:4":
            assert all(((w.view(len(w), -1, 4) != 0).sum(2) == 2).all() for w in weights)


def test_full_rank_equals_the_original(model: Path) -> None:
    torch.manual_seed(0)
    workspace = Workspace.open(model)
    module = workspace.parts(0).up
    x = torch.randn(50, 64)
    for gram in (None, x.double().t() @ x.double()):
        found = low_rank(module, decompose(module.weight.detach(), gram), 64)
        torch.testing.assert_close(found(x), module(x), atol=1e-4, rtol=1e-4)


def test_activation_aware_rank_is_better_on_its_inputs(model: Path) -> None:
    torch.manual_seed(0)
    module = Workspace.open(model).parts(0).up
    x = torch.randn(200, 64) * torch.logspace(-2, 1, 64)
    errors = [
        (low_rank(module, decompose(module.weight.detach(), gram), 16)(x) - module(x)).norm()
        for gram in (None, x.double().t() @ x.double())
    ]
    assert errors[1] < 0.8 * errors[0]


def test_recovery_comes_nearer_to_the_original(model: Path, questions: Path) -> None:
    examples = read_examples([questions], load_tokenizer(model), limit=7)
    batches = list(labelled_batches(examples))
    teacher, student = Workspace.open(model), Workspace.open(model)
    prune_two_of_four(student, sensitivity(student, batches))
    keep_neurons(student, 1, range(0, 256, 2))

    def distance() -> float:
        with torch.inference_mode():
            found = [(teacher.hidden(b.batch) - student.hidden(b.batch)).square() for b in batches]
        return float(torch.cat(found).mean())

    before = distance()
    losses = recover(student, teacher, batches, 30, learning_rate=1e-3)
    assert distance() < 0.7 * before
    assert losses[-1] < losses[0]
    weight = student.parts(0).up.weight
    assert ((weight.view(len(weight), -1, 4) != 0).sum(2) <= 2).all()


def test_report(model: Path, questions: Path, tmp_path: Path) -> None:
    report = compress_model(
        model,
        tmp_path / "made",
        method="int8-static",
        calibrate=[questions],
        evaluate=[questions],
    )
    content = json.loads((tmp_path / "made" / "compression.json").read_text(encoding="utf-8"))
    assert content["after"]["questions"] == 7
    assert content["after"]["memory_bytes"] < content["before"]["memory_bytes"]
    assert len(content["details"]["sensitivity"]["loss_without_layer"]) == 3
    assert report.f1_loss is not None
    text = (tmp_path / "made" / "compression.txt").read_text(encoding="utf-8")
    assert "size on disk" in text
    assert (tmp_path / "made" / "compression.svg").read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("int9", "2 to 8 bits"),
        ("int1", "2 to 8 bits"),
        ("gzip", "unknown method"),
        ("", "unknown method"),
        ("prune-heads", "a share"),
        ("prune-heads=1.5", "a share"),
        ("prune-layers=0.5", "whole number"),
        ("int8,prune-heads=0.5", "quantisation last"),
        ("int8,int4", "quantisation last"),
        ("words=3", "2, 4 or 8 bits, such as words=4"),
        ("words=4,words=8", "give it once$"),
        ("int8,words=4", "quantisation last"),
        ("svd=0.5,prune-heads=0.5", "prune first"),
        ("prune-heads=0.5", "--calibrate"),
        ("int8-static", "--calibrate"),
    ],
)
def test_refused_methods(model: Path, tmp_path: Path, method: str, said: str) -> None:
    with pytest.raises(CompressionError, match=said):
        compress_model(model, tmp_path / "made", method=method)
    assert not (tmp_path / "made").exists()


def test_refused_models(model: Path, questions: Path, tmp_path: Path) -> None:
    made = compress(model, tmp_path / "made", "int8")
    with pytest.raises(CompressionError, match=r"quantised already \(int8\)"):
        compress_model(made, tmp_path / "again", method="int4")
    with pytest.raises(CompressionError, match="there already"):
        compress_model(model, made, method="int8")
    with pytest.raises(CheckpointError, match="no such model directory"):
        compress_model(tmp_path / "none", tmp_path / "again", method="int8")
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CompressionError, match="SQuAD"):
        compress_model(
            model, tmp_path / "again", method="int8-static", calibrate=[tmp_path / "bad.json"]
        )
    thin = compress(model, tmp_path / "thin", "svd=0.5")
    with pytest.raises(CompressionError, match="factorised already"):
        compress_model(thin, tmp_path / "again", method="asvd=0.5", calibrate=[questions])


def test_refused_decoder(tmp_path: Path) -> None:
    from tests.decoder_checkpoints import make_decoder

    model = make_decoder(tmp_path / "llama", "llama")
    with pytest.raises(CompressionError, match="writes text"):
        compress_model(model, tmp_path / "made", method="int8")


def test_malformed_block(model: Path, tmp_path: Path) -> None:
    made = compress(model, tmp_path / "made", "int4")
    config = read_config(made)
    assert any(isinstance(m, PackedLinear) for _, m in compressed_modules(_skeleton(made)))
    config[BLOCK]["version"] = 2
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="version 2"):
        StageModel.load(made)
    config[BLOCK]["version"] = 1
    name = "bert.encoder.layer.0.output.dense"
    config[BLOCK]["linears"][name]["bits"] = 5
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="another shape"):
        StageModel.load(made)
    config[BLOCK]["linears"][name]["format"] = "zip"
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="malformed"):
        StageModel.load(made)


def _skeleton(directory: Path) -> torch.nn.Module:
    from miaotui.models.stage_info import inspect_model

    family, config, shape = inspect_model(Checkpoint.open(directory))
    return family.skeleton(config, LayerRange(0, shape.layers)).root


def test_a_recover_rate_is_used_and_checked(model: Path, questions: Path, tmp_path: Path) -> None:
    def weights(name: str, rate: float) -> torch.Tensor:
        compress_model(
            model,
            tmp_path / name,
            method="svd=0.5",
            calibrate=[questions],
            recover_steps=1,
            recover_rate=rate,
        )
        return run(tmp_path / name, "0-3")

    assert not torch.equal(weights("slow", 1e-5), weights("fast", 1e-3))
    for rate in (0.0, 1.0):
        with pytest.raises(CompressionError, match="recover rate"):
            weights("bad", rate)


def test_more_questions_may_be_recovered_on_than_calibrated_on(
    model: Path, questions: Path, tmp_path: Path
) -> None:
    def weights(calibrated: int, recovered: int) -> torch.Tensor:
        name = f"{calibrated}-{recovered}"
        compress_model(
            model,
            tmp_path / name,
            method="svd=0.5",  # which itself looks at no question
            calibrate=[questions],
            calibration_questions=calibrated,
            recover_steps=2,
            recover_rate=1e-3,
            recover_questions=recovered,
        )
        return run(tmp_path / name, "0-3")

    all_seven = weights(7, 0)
    assert torch.equal(weights(1, 7), all_seven)
    assert not torch.equal(weights(1, 0), all_seven)
    with pytest.raises(CompressionError, match="recover questions"):
        weights(1, -1)


def test_a_long_recovery_tells_how_far_it_is(
    model: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("miaotui.compression.recover._TELL_SECONDS", -1.0)
    batches = list(labelled_batches(read_examples([questions], load_tokenizer(model), limit=7)))
    with caplog.at_level("INFO", "miaotui.compression"):
        recover(Workspace.open(model), Workspace.open(model), batches, 3)
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        f"recovery: step {step} of 3" for step in (1, 2, 3)
    ]
