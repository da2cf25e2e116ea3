"""Packed codes and rounding, by themselves."""

from __future__ import annotations

import pytest
import torch

from miaotui.compression.factorize import choose_ranks
from miaotui.models.compressed import (
    Int8Embedding,
    PackedEmbedding,
    PackedLinear,
)
from miaotui.models.rounding import (
    pack_codes,
    quantize_groups,
    quantize_rows,
    unpack_codes,
    unpack_even_codes,
)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("width", [1, 7, 8, 33])
def test_packed_codes_come_back(bits: int, width: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (5, width), generator=generator, dtype=torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (5, -(-width * bits // 8))
    assert torch.equal(unpack_codes(packed, bits, width), codes)


def test_packed_layout() -> None:
    """Codes end to end, most significant bit first, offset by half: as the format is described."""
    codes = torch.tensor([[-4, 3, 0]], dtype=torch.int8)  # 000 111 100, padded with zeros
    assert pack_codes(codes, 3).tolist() == [[0b00011110, 0b00000000]]


@pytest.mark.parametrize("bits", range(2, 8))
def test_group_error_is_within_a_step(bits: int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(6, 50)
    module = PackedLinear(50, 6, bits=bits, group=16, bias=False, static=False)
    module.weight, module.weight_scale = quantize_groups(weight, bits, 16)
    assert module.weight_scale.shape == (6, 4)
    greatest = weight.abs().max()
    error = (module.dequantized() - weight).abs().max()
    # Cut off at six tenths of the greatest at worst, or half a step.
    assert error <= max(0.4 * greatest, greatest / (2 ** (bits - 1) - 1) / 2) + 1e-6
    mean = (module.dequantized() - weight).square().mean().sqrt()
    assert mean < 1.2 * 2.0**-bits * greatest


def test_rows_error_is_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.cat([torch.randn(4, 40), torch.zeros(1, 40)])
    codes, scale = quantize_rows(weight)
    error = (codes * scale[:, None] - weight).abs()
    assert (error <= scale[:, None] / 2 + 1e-6).all()
    table = Int8Embedding(5, 40)
    table.weight, table.weight_scale = codes, scale
    ids = torch.tensor([[3, 0], [4, 1]])
    assert torch.equal(table(ids), (codes * scale[:, None])[ids])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("width", [1, 7, 8, 33])
def test_looked_up_codes_are_those_unpacked_whole(bits: int, width: int) -> None:
    packed = torch.randint(0, 256, (6, -(-width * bits // 8)), dtype=torch.uint8)
    whole = unpack_codes(packed, bits, width)
    ids = torch.tensor([[3, 0], [5, 3]])
    assert torch.equal(unpack_even_codes(packed[ids], bits, width), whole[ids])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("width", [40, 50])
def test_a_packed_table_is_a_packed_matrix_by_rows(bits: int, width: int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(6, width)
    matrix = PackedLinear(width, 6, bits=bits, group=16, bias=False, static=False)
    table = PackedEmbedding(6, width, bits=bits, group=16)
    for module in (matrix, table):
        module.weight, module.weight_scale = quantize_groups(weight, bits, 16)
    ids = torch.tensor([[3, 0], [5, 3]])
    assert torch.equal(table(ids), matrix.dequantized()[ids])
    assert table.resident_bytes() == 6 * (-(-width * bits // 8) + 4 * -(-width // 16))


def test_ranks_keep_to_the_budget() -> None:
    torch.manual_seed(0)
    shapes = [(64, 64), (256, 64), (64, 256)]
    values = [torch.linalg.svdvals(torch.randn(shape)) for shape in shapes]
    for share in (0.2, 0.5, 0.8):
        ranks = choose_ranks(list(zip(shapes, values, strict=True)), share)
        spent = sum(
            a * b if rank is None else rank * (a + b)
            for (a, b), rank in zip(shapes, ranks, strict=True)
        )
        whole = sum(a * b for a, b in shapes)
        assert 0.9 * share * whole <= spent <= share * whole
