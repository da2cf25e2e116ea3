"""Takes out what matters least: single weights, heads, neurons, layers.

How much a weight w matters is |w * dL/dw|, the loss's change to first order were it 0 (Molchanov
et al., CVPR 2019), or w^2 * E[(dL/dw)^2] / 2, to second order with the empirical Fisher matrix's
diagonal for the Hessian (LeCun et al., NIPS 1989; Theis et al., 2018). Of a head or neuron it is
that of a gate on its output (Michel et al., NeurIPS 2019; Kwon et al., NeurIPS 2022). Of a layer
it is measured: the loss without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from miaotui.compression.errors import CompressionError
from miaotui.compression.questions import Labelled
from miaotui.compression.workspace import Workspace
from miaotui.models.compressed import CompressedModule

# Neurons are taken out in such numbers that the products keep the shapes that kernels like.
_NEURON_MULTIPLE = 16


@dataclass(frozen=True)
class Sensitivity:
    """What matters how much: by (layer, part) of each weight, and by layer of each unit.

    `weights`: float32 [out, in]; `heads` [heads] and `neurons` [intermediate] a layer.
    """

    weights: dict[tuple[int, str], torch.Tensor]
    heads: list[torch.Tensor]
    neurons: list[torch.Tensor]

    def by_layer(self) -> list[dict[str, float]]:
        """Sums over each linear, for a report."""
        layers: list[dict[str, float]] = [{} for _ in self.heads]
        for (layer, part), values in self.weights.items():
            layers[layer][part] = float(values.sum())
        return layers


def span_loss(logits: torch.Tensor, item: Labelled) -> torch.Tensor:
    """Mean cross-entropy of the answers' first and last tokens, over the windows."""
    losses = []
    begin = 0
    for length, start, end in zip(item.batch.lengths, item.starts, item.ends, strict=True):
        window = logits[begin : begin + length]
        target = torch.tensor([start, end])
        losses.append(cross_entropy(window.t(), target))
        begin += length
    return torch.stack(losses).mean()


def sensitivity(
    workspace: Workspace, batches: Sequence[Labelled], *, second_order: bool = False
) -> Sensitivity:
    """Measure on batches, each of which counts once.

    Raises:
        CompressionError: the model is factorised already.
    """
    linears = list(workspace.linears())
    if any(isinstance(module, CompressedModule) for _, _, module in linears):
        raise CompressionError(
            f"{workspace.directory}: factorised already; prune the model that it was made from"
        )
    weights: dict[tuple[int, str], torch.Tensor] = {}
    count = len(workspace.layers)
    heads, neurons = [torch.zeros(0)] * count, [torch.zeros(0)] * count
    for _, _, module in linears:
        module.requires_grad_(True)
    for item in batches:
        span_loss(workspace.logits(item.batch), item).backward()
        for layer, part, module in linears:
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            assert weight.grad is not None
            change = weight.detach() * weight.grad
            # At once over a batch for the weights; a gate's gradient is their sum.
            score = change.square() / 2 if second_order else change.abs()
            _add(weights, (layer, part), score)
            if part == "attention_out":
                gates = change.view(len(change), -1, workspace.head_dim).sum((0, 2))
                heads[layer] = _sum(heads[layer], gates, second_order)
            if part == "down":
                neurons[layer] = _sum(neurons[layer], change.sum(0), second_order)
            module.zero_grad()
    for _, _, module in linears:
        module.requires_grad_(False)
    return Sensitivity(weights, heads, neurons)


@torch.inference_mode()
def layer_losses(workspace: Workspace, batches: Sequence[Labelled]) -> tuple[float, list[float]]:
    """The loss with all layers, and without each one."""

    def loss(skip: int | None) -> float:
        found = [float(span_loss(workspace.logits(b.batch, skip=skip), b)) for b in batches]
        return sum(found) / len(found)

    return loss(None), [loss(index) for index in range(len(workspace.layers))]


def prune_weights(workspace: Workspace, found: Sensitivity, share: float) -> dict[str, float]:
    """Set a share of all linears' weights to 0: the least, of each matrix at most nine tenths.

    The matrices stay as large, and a CPU takes as long over a 0 as over another number.
    Returns the share of each linear that went, by "layer.part".
    """
    scores = torch.cat([values.flatten() for values in found.weights.values()])
    limit = _kth(scores, share)
    gone = {}
    for layer, part, module in workspace.linears():
        values = found.weights[layer, part]
        mask = values > min(limit, _kth(values.flatten(), 0.9))
        _keep(module, mask)
        gone[f"{layer}.{part}"] = 1 - float(mask.float().mean())
    return gone


def prune_two_of_four(workspace: Workspace, found: Sensitivity) -> None:
    """Set the least two of every four weights along the input to 0 (2:4 sparsity).

    GPUs since Ampere have kernels for it (Mishra et al., 2021, arXiv:2104.08378), CPUs have none.
    A width that four does not divide leaves its last weights as they are.
    """
    for layer, part, module in workspace.linears():
        values = found.weights[layer, part]
        width = values.shape[1] // 4 * 4
        blocks = values[:, :width].reshape(len(values), -1, 4)
        mask = torch.ones_like(values, dtype=torch.bool)
        kept = torch.zeros_like(blocks, dtype=torch.bool)
        kept.scatter_(2, blocks.topk(2, dim=2).indices, True)
        mask[:, :width] = kept.view(len(values), width)
        _keep(module, mask)


def prune_heads(workspace: Workspace, found: Sensitivity, share: float) -> list[list[int]]:
    """Take a share of all heads out, at least one a layer stays; returns who stays, by layer."""
    kept = _survivors(found.heads, share, least=1, multiple=1)
    for layer, units in enumerate(kept):
        keep_heads(workspace, layer, units)
    return kept


def prune_neurons(workspace: Workspace, found: Sensitivity, share: float) -> list[int]:
    """Take a share of the feed-forward neurons out; returns how many stay, by layer."""
    kept = _survivors(found.neurons, share, least=_NEURON_MULTIPLE, multiple=_NEURON_MULTIPLE)
    for layer, units in enumerate(kept):
        keep_neurons(workspace, layer, units)
    return [len(units) for units in kept]


def prune_layers(workspace: Workspace, batches: Sequence[Labelled], count: int) -> list[int]:
    """Take whole layers out, each time the one without which the loss is least.

    Returns their numbers in the model as it was.

    Raises:
        CompressionError: none would be left.
    """
    names = list(range(len(workspace.layers)))
    if count >= len(names):
        raise CompressionError(f"prune-layers={count}: the model has {len(names)}; one must stay")
    gone = []
    for _ in range(count):
        _, losses = layer_losses(workspace, batches)
        index = losses.index(min(losses))
        gone.append(names.pop(index))
        workspace.drop_layer(index)
    return gone


def keep_heads(workspace: Workspace, layer: int, heads: Sequence[int]) -> None:
    """Cut a layer down to some of its heads."""
    parts, width = workspace.parts(layer), workspace.head_dim
    rows = torch.cat([torch.arange(head * width, (head + 1) * width) for head in heads])
    for module in (parts.query, parts.key, parts.value):
        workspace.replace(module, _cut(module, rows=rows))
    workspace.replace(parts.attention_out, _cut(parts.attention_out, columns=rows))


def keep_neurons(workspace: Workspace, layer: int, neurons: Sequence[int]) -> None:
    """Cut a layer's feed-forward network down to some of its neurons."""
    parts, rows = workspace.parts(layer), torch.tensor(list(neurons))
    workspace.replace(parts.up, _cut(parts.up, rows=rows))
    workspace.replace(parts.down, _cut(parts.down, columns=rows))


def _cut(
    module: nn.Linear, *, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
) -> nn.Linear:
    weight, bias = module.weight.detach(), module.bias.detach()
    if rows is not None:
        weight, bias = weight[rows], bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    new = nn.Linear(weight.shape[1], weight.shape[0])
    new.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=False)
    new.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return new.eval()


def _survivors(
    scores: Sequence[torch.Tensor], share: float, *, least: int, multiple: int
) -> list[list[int]]:
    """The best units over all layers, so many that about `share` goes; ascending, by layer."""
    limit = _kth(torch.cat(list(scores)), share)
    kept = []
    for values in scores:
        count = int((values > limit).sum())
        count = min(max(round(count / multiple) * multiple, least), len(values))
        kept.append(sorted(values.topk(count).indices.tolist()))
    return kept


def _kth(values: torch.Tensor, share: float) -> float:
    """The greatest of the least `share` of the values; -1 where that is none."""
    count = int(share * len(values))
    return float(values.kthvalue(count).values) if count else -1.0


def _keep(module: nn.Module, mask: torch.Tensor) -> None:
    assert isinstance(module, nn.Linear)
    module.weight = nn.Parameter(module.weight.detach() * mask, requires_grad=False)


def _add(
    into: dict[tuple[int, str], torch.Tensor], key: tuple[int, str], value: torch.Tensor
) -> None:
    into[key] = into[key] + value if key in into else value


def _sum(held: torch.Tensor, gates: torch.Tensor, second_order: bool) -> torch.Tensor:
    score = gates.square() / 2 if second_order else gates.abs()
    return held + score if len(held) else score
