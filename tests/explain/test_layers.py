"""Layers for gradients equal transformers' modules, also compressed ones and at few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from miaotui.compression.factorize import decompose, low_rank
from miaotui.compression.prune import keep_heads, keep_neurons
from miaotui.compression.workspace import Workspace
from miaotui.explain.layers import gradient_layers
from miaotui.models.attention import PackedSequences
from miaotui.models.compressed import LowRankLinear
from miaotui.models.packed import LinearPart
from miaotui.models.stage import StageModel
from tests.checkpoints import make_checkpoint, one_thread

WIDTH, TOKENS, SEQUENCES = 256, 12, 3


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole layer, one with fewer heads and neurons, and one with a product of low rank."""
    root = tmp_path_factory.mktemp("layers")
    workspace = Workspace.open(make_checkpoint(root / "bert", "bert", layers=3, hidden=WIDTH))
    keep_heads(workspace, 1, [0, 3])
    keep_neurons(workspace, 1, range(0, 700))
    module = workspace.parts(2).up
    workspace.replace(module, low_rank(module, decompose(module.weight.detach()), 40))
    workspace.save(root / "cut", ["cut"], {})
    return root / "cut"


def _with_gradient(output: torch.Tensor, leaf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = torch.linspace(-1, 1, output.numel()).view_as(output)
    (gradient,) = torch.autograd.grad((output * shape).sum(), leaf)
    return output.detach(), gradient


@pytest.mark.parametrize("places", [[2, 7], [5]])
@pytest.mark.parametrize("fuse", [True, False])
def test_equal_to_the_modules(directory: Path, fuse: bool, places: list[int]) -> None:
    stage = StageModel.load(directory, device="cpu", dtype="float32", fuse=fuse)
    layers = stage.skeleton.layers
    kinds = [{type(module) for module in layer.modules()} for layer in layers]
    assert (LinearPart in kinds[0]) is fuse, "the weights are to be unpacked"
    assert LowRankLinear in kinds[2]
    packed = PackedSequences.of([TOKENS] * SEQUENCES, torch.device("cpu"))
    hidden = torch.randn(TOKENS * SEQUENCES, WIDTH, generator=torch.Generator().manual_seed(1))
    made = gradient_layers(layers, stage.shape.model_type, stage.shape.heads)
    for module, layer in zip(layers, made, strict=True):
        leaf = hidden.clone().requires_grad_()
        called: Any = module
        wanted = called(leaf[None], None, packed=packed)[0]
        few = wanted.view(SEQUENCES, TOKENS, WIDTH)[:, places].flatten(0, 1)
        expected = _with_gradient(few, leaf)
        torch.testing.assert_close(
            _with_gradient(layer.at(leaf, packed, places), leaf), expected, atol=1e-5, rtol=1e-4
        )
        whole = called(leaf[None], None, packed=packed)[0]
        torch.testing.assert_close(
            _with_gradient(layer(leaf, packed), leaf),
            _with_gradient(whole, leaf),
            atol=1e-5,
            rtol=1e-4,
        )
        assert float(expected[1].abs().max()) > 0.01
