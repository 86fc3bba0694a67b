"""Tensors of more than 2^31 elements on a card: last, for a wrong address would end whatever comes after it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import (
    stock_gradient,
)
from on_a_card import DEVICE, NEEDS_A_CARD

import invact
from invact.kernels import CURVES, masks

pytestmark = pytest.mark.gpu


@NEEDS_A_CARD
def test_more_than_2_31_elements_are_all_reached() -> None:
    count = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 10.5 * count:
        pytest.skip("the card has too little memory left")
    x = torch.empty(count, dtype=torch.bfloat16, device=DEVICE)
    parts = [slice(0, 4096), slice(2**31 - 2048, 2**31 + 2048), slice(count - 4096, count)]
    for part in parts:
        x[part] = torch.randn(4096, device=DEVICE)
    x.requires_grad_()
    y = invact.functional.gelu(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones((), dtype=x.dtype, device=DEVICE).expand(count))
    for part in parts:
        torch.testing.assert_close(y[part], F.gelu(x[part]), atol=1e-6, rtol=2**-7)
        torch.testing.assert_close(dx[part], stock_gradient(x[part], CURVES["gelu"]), atol=0.03, rtol=0.03)


@NEEDS_A_CARD
def test_masks_of_more_than_2_31_elements_are_all_reached() -> None:
    count = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 8 * count:
        pytest.skip("the card has too little memory left")
    mask = torch.zeros(count, dtype=torch.bool, device=DEVICE)
    parts = [slice(0, 4096), slice(2**31 - 2048, 2**31 + 2048), slice(count - 4096, count)]
    for part in parts:
        mask[part] = torch.rand(4096, device=DEVICE) < 0.5
    bits = masks.packed(mask)
    back = masks.unpacked(bits, count)
    assert all(torch.equal(back[part], mask[part]) for part in parts)
    del back
    x = torch.ones(count, dtype=torch.bfloat16, device=DEVICE)
    y = masks.dropped(x, bits, (1,), 2.0)
    assert all(torch.equal(y[part], 2 * mask[part].to(x.dtype)) for part in parts)
