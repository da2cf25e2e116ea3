"""Rounds weights to 8 or fewer bits, and finds scales for activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from miaotui.compression.questions import Labelled
from miaotui.compression.rounded import rounded
from miaotui.compression.statistics import InputCodes, InputStatistics, input_statistics
from miaotui.compression.workspace import INPUTS, Workspace
from miaotui.models.compressed import (
    AnyTable,
    Int8Embedding,
    Int8Linear,
    LowRankLinear,
    PackedEmbedding,
    PackedLinear,
    QuantizedLinear,
)
from miaotui.models.rounding import quantize_groups, quantize_rows


def quantize(
    workspace: Workspace,
    bits: int,
    *,
    static: bool,
    batches: Sequence[Labelled] = (),
    group: int = 32,
    train: Callable[[], None] | None = None,
) -> None:
    """Round all layers' linears and the word embeddings of a model, in place.

    Args:
        workspace: the model; its linears may have been pruned or factorised.
        bits: of the layers' weights: 8, or 2 to 7 in groups. Word embeddings get 8.
        static: whether activations are rounded by scales calibrated on `batches` (W8A8 static)
            or by one found for each token as it comes.
        batches: what to calibrate on, with `static`.
        group: inputs that share a scale, below 8 bits.
        train: trains the model in place; called once it computes as it will when rounded.
    """
    quantize_words(workspace, 8, group)
    chosen = _chosen_codes(workspace, batches, static=static)
    if train is not None:
        with rounded(chosen, bits, group):
            train()
    for _, _, module in list(workspace.linears()):
        if isinstance(module, LowRankLinear):
            factors = (_round(one, bits, group, chosen) for one in (module.inner, module.outer))
            workspace.replace(module, LowRankLinear(*factors))
        else:
            workspace.replace(module, _round(module, bits, group, chosen))


def quantize_words(workspace: Workspace, bits: int, group: int = 32) -> None:
    """Round the word embeddings of a model in place, unless they are rounded already.

    Args:
        workspace: the model.
        bits: 8, with a scale for each row, or 2 or 4, in groups.
        group: values of a row that share a scale, below 8 bits.
    """
    for name, module in list(workspace.skeleton.root.named_modules()):
        if isinstance(module, nn.Embedding) and name.endswith("word_embeddings"):
            shape, weight = (module.num_embeddings, module.embedding_dim), module.weight.detach()
            table: AnyTable
            if bits == 8:
                table = Int8Embedding(*shape)
                table.weight, table.weight_scale = quantize_rows(weight)
            else:
                table = PackedEmbedding(*shape, bits=bits, group=group)
                table.weight, table.weight_scale = quantize_groups(weight, bits, group)
            workspace.replace(module, table)


def _chosen_codes(
    workspace: Workspace, batches: Sequence[Labelled], *, static: bool
) -> dict[nn.Linear, InputCodes | None]:
    """All linears that are to be rounded, and how what goes into them is; None: as it comes."""
    codes = _input_codes(workspace, batches) if static else {}
    inner = _inner_statistics(workspace, batches) if static else {}
    chosen: dict[nn.Linear, InputCodes | None] = {}
    for layer, part, module in workspace.linears():
        first = module.inner if isinstance(module, LowRankLinear) else module
        assert isinstance(first, nn.Linear)
        chosen[first] = codes.get((layer, INPUTS[part]))
        if isinstance(module, LowRankLinear):
            outer = module.outer
            assert isinstance(outer, nn.Linear)
            between = inner[module].codes(outer.weight.detach(), smooth=False) if static else None
            chosen[outer] = between
    return chosen


@torch.inference_mode()
def _input_codes(
    workspace: Workspace, batches: Sequence[Labelled]
) -> dict[tuple[int, str], InputCodes]:
    """How to round what goes into linears; those with the same input share its codes."""
    weights: dict[tuple[int, str], list[torch.Tensor]] = {}
    for layer, part, module in workspace.linears():
        first = module.inner if isinstance(module, LowRankLinear) else module
        assert isinstance(first, nn.Linear)
        weights.setdefault((layer, INPUTS[part]), []).append(first.weight.detach())
    statistics = input_statistics(workspace, batches)
    return {
        # The last product takes its codes right from the one before, unscaled.
        key: found.codes(torch.cat(weights[key]), smooth=key[1] != "down")
        for key, found in statistics.items()
    }


def _round(
    module: nn.Module, bits: int, group: int, chosen: Mapping[nn.Linear, InputCodes | None]
) -> QuantizedLinear:
    assert isinstance(module, nn.Linear)
    codes = chosen[module]
    shape = (module.in_features, module.out_features)
    bias, static = module.bias is not None, codes is not None
    smooth = None if codes is None else codes.smooth
    weight = module.weight.detach()
    if smooth is not None:
        weight = weight / smooth
    new: QuantizedLinear
    if bits == 8:
        new = Int8Linear(*shape, bias=bias, static=static, smooth=smooth is not None)
        new.weight, new.weight_scale = quantize_rows(weight)
    else:
        new = PackedLinear(
            *shape, bits=bits, group=group, bias=bias, static=static, smooth=smooth is not None
        )
        new.weight, new.weight_scale = quantize_groups(weight, bits, group)
    if bias:
        new.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
    if codes is not None:
        new.input_scale = torch.tensor([codes.scale])
        new.input_zero_point = torch.tensor([codes.zero], dtype=torch.int32)
    if smooth is not None:
        new.input_smooth = smooth.clone()
    return new


@torch.inference_mode()
def _inner_statistics(
    workspace: Workspace, batches: Sequence[Labelled]
) -> dict[nn.Module, InputStatistics]:
    """What lies between the factors of low-rank linears."""
    found: dict[nn.Module, InputStatistics] = {}
    hooks = []
    for _, _, module in workspace.linears():
        if isinstance(module, LowRankLinear):

            def look(_m: nn.Module, x: tuple[torch.Tensor], key: nn.Module = module) -> None:
                flat = x[0].reshape(-1, x[0].shape[-1])
                found.setdefault(key, InputStatistics(flat.shape[1])).add(flat, gram=False)

            hooks.append(module.outer.register_forward_pre_hook(look))
    try:
        for item in batches if hooks else ():
            workspace.hidden(item.batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found
