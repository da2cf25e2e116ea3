"""Rounds numbers to codes of few bits and back, and packs codes into bytes."""

from __future__ import annotations

import numpy as np
import torch


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round float [rows, width] to int8 codes from -127 to 127 and a float32 scale a row."""
    scale = (weight.float().abs().amax(1) / 127).clamp_min(1e-12)
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantize_groups(
    weight: torch.Tensor, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round float [out, in] to packed codes of `bits` bits; what `PackedLinear` holds."""
    codes, scale = group_codes(weight, bits, group)
    return pack_codes(codes, bits), scale


def group_codes(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round float [out, in] to int8 codes of `bits` bits, with a float32 scale per `group` inputs.

    The scale of a group is the one of a few fractions of its greatest weight that leaves the
    least squared error.
    """
    outputs, inputs = weight.shape
    groups = -(-inputs // group)
    padded = torch.zeros(outputs, groups * group)
    padded[:, :inputs] = weight
    blocks = padded.view(outputs, groups, group)
    top = 2 ** (bits - 1) - 1
    greatest = blocks.abs().amax(2, keepdim=True).clamp_min(1e-12)
    best = torch.full_like(greatest, torch.inf)
    scale = greatest / top
    for fraction in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6):
        tried = greatest * (fraction / top)
        codes = (blocks / tried).round().clamp(-top - 1, top)
        error = (codes * tried - blocks).square().sum(2, keepdim=True)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(error, best)
    codes = (blocks / scale).round().clamp(-top - 1, top).view(outputs, -1)[:, :inputs]
    return codes.to(torch.int8), scale.squeeze(2)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack int8 codes [rows, width] from -2^(bits-1) on into uint8 [rows, ceil(width*bits/8)]."""
    unsigned = (codes.to(torch.int16) + 2 ** (bits - 1)).numpy().astype(np.uint8)
    single = np.unpackbits(unsigned[:, :, None], axis=2)[:, :, 8 - bits :]
    return torch.from_numpy(np.packbits(single.reshape(len(unsigned), -1), axis=1))


def unpack_codes(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Undo `pack_codes`: int8 [rows, width]."""
    single = np.unpackbits(packed.numpy(), axis=1)[:, : width * bits]
    single = single.reshape(len(packed), width, bits)
    unsigned = np.packbits(single, axis=2)[:, :, 0] >> (8 - bits)
    return torch.from_numpy(unsigned.astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)


def unpack_even_codes(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Undo `pack_codes` for codes of 1, 2 or 4 bits, on any device.

    uint8 [..., bytes] to int8 [..., width].
    """
    shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts).bitwise_and_(2**bits - 1)
    return codes.flatten(-2)[..., :width].to(torch.int8).sub_(2 ** (bits - 1))


def dequantize_groups(codes: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """What codes stand for: int8 [..., width] and a scale per group of them, to float32."""
    whole = scale.repeat_interleave(group, -1)[..., : codes.shape[-1]]
    return codes.float().mul_(whole)


def round_static(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Round float32 to the values that unsigned 8-bit codes stand for."""
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def round_per_token(x: torch.Tensor) -> torch.Tensor:
    """Round float32 [..., width] to 255 levels, symmetric, with a scale for every token."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round() * scale
