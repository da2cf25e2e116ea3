"""Fills a stage's skeleton: its own tensors are read from a checkpoint, and no others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from miaotui.models.checkpoint import Checkpoint
from miaotui.models.compressed import compressed_modules
from miaotui.models.families import Skeleton


def fill_skeleton(
    skeleton: Skeleton, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> None:
    """Read an encoder's tensors in place of its meta ones; the head is held in float32.

    Raises:
        CheckpointError: files are missing, damaged or do not belong together.
    """
    head = set() if skeleton.head is None else {id(p) for p in skeleton.head.parameters()}
    body_shapes: dict[str, tuple[int, ...]] = {}
    head_shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in skeleton.root.named_parameters():
        shapes = head_shapes if id(parameter) in head else body_shapes
        shapes[name] = tuple(parameter.shape)
    state = checkpoint.read(body_shapes, dtype, device)
    state |= checkpoint.read(head_shapes, torch.float32, device)
    codes = {
        f"{prefix}.{name}": buffer
        for prefix, module in compressed_modules(skeleton.root)
        for name, buffer in module.named_buffers(recurse=False)
    }
    state |= checkpoint.read_stored(codes, device)
    skeleton.root.load_state_dict(state, assign=True)
    skeleton.root.requires_grad_(False)
    _check_materialised(skeleton.root)


def fill_root(
    root: nn.Module,
    sources: Mapping[str, str],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Read the tensors of a model that writes in place of its meta ones.

    `sources`: which of the checkpoint's tensors each parameter is.

    Raises:
        CheckpointError: files are missing, damaged or do not belong together.
    """
    parameters = dict(root.named_parameters(remove_duplicate=False))
    shapes = {sources[name]: tuple(parameter.shape) for name, parameter in parameters.items()}
    tensors = checkpoint.read(shapes, dtype, device)
    # A tensor that several parameters are read from is held once.
    held = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    for name, source in sources.items():
        owner, _, attribute = name.rpartition(".")
        setattr(root.get_submodule(owner), attribute, held[source])
    for module in root.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
    _check_materialised(root)


def _check_materialised(root: nn.Module) -> None:
    """Assert that no tensor of a stage was forgotten, whether or not checkpoints hold it."""
    tensors = [*root.named_parameters(), *root.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    assert not left, f"tensors were not loaded: {left}"
