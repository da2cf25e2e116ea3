"""Integer products are exact, on CPUs with VNNI instructions and without."""

from __future__ import annotations

import pytest
import torch

from miaotui.models.compressed import Int8Linear
from miaotui.models.integer import DynamicProduct, largest_weight, narrow
from miaotui.models.rounding import quantize_rows


def extreme(outputs: int, inputs: int) -> Int8Linear:
    """A layer whose weights are at the ends of their range, where kernels may be wrong."""
    generator = torch.Generator().manual_seed(inputs)
    signs = torch.randint(0, 2, (outputs, inputs), generator=generator) * 2 - 1
    signs[0], signs[1] = 1, -1
    module = Int8Linear(inputs, outputs, bias=False, static=False)
    module.weight = (signs * 127).to(torch.int8)
    return module


@pytest.mark.parametrize("inputs", [64, 384, 1536])
def test_products_are_exact(inputs: int) -> None:
    assert largest_weight() in (127, 63)
    module = extreme(48, inputs)
    weight = module.weight.double()
    codes = torch.randint(-127, 128, (37, inputs), generator=torch.Generator().manual_seed(1))
    codes[:, 0] = 127  # so that a row's scale is 1
    codes[0], codes[1] = 127, -127
    found = DynamicProduct([module])(codes.float())
    expected = codes.double() @ weight.t()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-3)


def test_narrowed_weights_are_the_nearest() -> None:
    weight = torch.randn(8, 100, generator=torch.Generator().manual_seed(2))
    module = Int8Linear(100, 8, bias=False, static=False)
    module.weight, module.weight_scale = quantize_rows(weight)
    narrow(module, 63)
    assert int(module.weight.abs().max()) == 63
    step = module.weight_scale[:, None]
    error = (module.weight.float() * step - weight).abs()
    assert bool((error <= 0.76 * step).all())  # half a step, and a quarter from rounding twice


def test_eight_bits_stay_as_they_are() -> None:
    module = extreme(4, 32)
    weight = module.weight.clone()
    narrow(module, 127)
    assert torch.equal(module.weight, weight)
    assert torch.equal(module.weight_scale, torch.ones(4))
