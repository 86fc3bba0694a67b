"""What only a card shows: its own operators, layouts and sizes. Without one they can run on the CPU too.

Marked `gpu`, so that a usual run leaves them out; `-m gpu` runs them, and `python benchmarks/card` does.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from exactness import (
    SHORT_DTYPES,
    derivative_from_output,
    errors_and_floors,
    every_value,
    ulps,
)
from on_a_card import DEVICE
from torch import Tensor, nn

import invact
from invact.deriving.rules.dropout import dropout_scale
from invact.inverting.autograd_functions import invert
from invact.inverting.few_bits import few_bits
from invact.kernels import CURVES, Curve, codes, forward, gated, masks
from invact.kernels.curves.two_sided import TWO_SIDED, TwoSided
from invact.kernels.few_bits import packing as code_packing
from invact.kernels.few_bits.step_functions import steps
from invact.kernels.pytorch import packing

pytestmark = pytest.mark.gpu


EVERY_CURVE = pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES.keys())
EVERY_TWO_SIDED = pytest.mark.parametrize("curve", TWO_SIDED, ids=str)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [*SHORT_DTYPES, torch.float32], ids=str)
DENORMAL, HUGE = 1e-42, 1e30
NOTHING = 1e-35  # what is smaller may be 0


def values(dtype: torch.dtype) -> Tensor:
    """All of a 16-bit type; of fp32 a million random ones and those at the ends."""
    if dtype.itemsize == 2:
        return every_value(dtype)
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([0.0, -0.0, DENORMAL, -DENORMAL, HUGE, -HUGE, 88.0, -88.0, 104.0, -104.0])
    return torch.cat([3 * torch.randn(1 << 20, generator=generator), torch.linspace(-120, 120, 1 << 16), ends])


# --- exactness ----------------------------------------------------------------------------------------


def true_output(x: Tensor, curve: Curve) -> Tensor:
    """f of x to the last digits also where stock's formula takes the difference of two numbers near 1; float64."""
    x = x.double()
    if curve.name == "gelu":
        return x * torch.special.erfc(-x * math.sqrt(0.5)) / 2
    if curve.name == "gelu_tanh":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return curve.f(x)


@EVERY_CURVE
@EVERY_DTYPE
def test_every_16_bit_output_and_a_million_others_are_stocks_or_nearer_to_the_truth(
    curve: Curve, dtype: torch.dtype, record_property
) -> None:
    """Within one unit in the last place of stock's, or as near to the true value, in fp32 up to some units of it."""
    x = values(dtype).to(DEVICE)
    ours, stock = forward(x, curve)[0], curve.f(x)
    finite = stock.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    x, ours, stock = x[finite], ours[finite], stock[finite]
    true = true_output(x, curve)
    error, allowed = (ours.double() - true).abs(), (stock.double() - true).abs()
    if dtype == torch.float32:
        allowed += torch.where(x.abs() < 3, 1.5e-6, 1e-5) * true.abs()
    apart = ulps(ours, stock)
    wrong = (apart > 1) & ~(error <= allowed) & (true.abs() > NOTHING)
    record_property("ulps between outputs", int(apart[true.abs() > NOTHING].max()))
    record_property("outputs more than 1 ulp from stock's", int((apart > 1).sum()))
    assert not wrong.any(), f"{int(wrong.sum())} outputs, such as at x = {x[wrong][:5].tolist()!r}"


@EVERY_CURVE
@EVERY_DTYPE
def test_no_every_16_bit_value_or_other_finite_one_gives_nan(curve: Curve, dtype: torch.dtype) -> None:
    x = values(dtype).to(DEVICE)
    x = x[curve.f(x).isfinite()].requires_grad_()  # fp16 overflows inside some of stock's formulas
    y = invert(x, curve)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.isfinite().all(), x[~dx.isfinite()][:8]


@EVERY_TWO_SIDED
@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
def test_every_16_bit_gradient_reaches_the_floor_of_one_bit(
    curve: TwoSided, dtype: torch.dtype, record_property
) -> None:
    x = every_value(dtype)
    x = x[curve.f(x).isfinite()]
    y, ours = forward(x.to(DEVICE), curve)[0].cpu(), derivative_from_output(x.to(DEVICE), curve).cpu()
    for deviation in (1.0, 3.0):
        errors, floors = errors_and_floors(x, y, ours, curve, deviation)
        record_property("gradient's error over its floor", errors.norm / floors.norm)
        assert errors.norm <= 1.08 * floors.norm
        assert errors.largest <= 2.1 * floors.largest


@EVERY_TWO_SIDED
def test_fp32_gradients_reach_the_floor_of_one_bit(curve: TwoSided, record_property) -> None:
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    true = curve.derivative(x.double())
    error = derivative_from_output(x.to(DEVICE), curve).cpu().double() - true
    record_property("fp32 gradient's relative error", float(error.norm() / true.norm()))
    assert error.norm() / true.norm() <= 2.6e-6
    assert error.abs().max() <= 4e-4


# --- layouts and sizes --------------------------------------------------------------------------------


def assert_as_stock(x: Tensor, name: str = "gelu") -> None:
    curve = CURVES[name]
    x = x.detach().requires_grad_()
    y, stock = invert(x, curve), curve.f(x)
    assert y.stride() == stock.stride()
    torch.testing.assert_close(y, stock)
    dy = torch.randn_like(stock)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, stock)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
@pytest.mark.parametrize("name", ["gelu", "silu", "hardswish", "elu"])
def test_any_size_gets_stocks_values_and_gradients(count: int, name: str) -> None:
    assert_as_stock(torch.randn(count, device=DEVICE), name)


def test_any_layout_gets_stocks_values_gradients_and_strides() -> None:
    image = torch.randn(3, 5, 4, 7, device=DEVICE)
    assert_as_stock(image)
    assert_as_stock(image.to(memory_format=torch.channels_last))
    assert_as_stock(image[:, ::2, :, 1:])
    assert_as_stock(image.transpose(1, 3))
    assert_as_stock(image[:1].expand(6, -1, -1, -1))
    assert_as_stock(image[0, 0, 0, 0])
    assert_as_stock(image.flatten()[1:])  # not at 16 bytes


def test_a_kernel_built_once_serves_other_lengths_and_addresses() -> None:
    for _ in range(2):
        for count in (16, 17, 1000, 4096):
            for start in (0, 1, 8):
                assert_as_stock(torch.randn(count + start, device=DEVICE)[start:])


# --- masks in bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000, 4096, 4097, 70001])
def test_masks_come_back_from_their_bits(count: int) -> None:
    for start in (0, 8):  # and so not at 16 bytes
        mask = (torch.rand(count + start, device=DEVICE) < 0.7)[start:]
        bits = masks.packed(mask)
        assert torch.equal(bits.cpu(), packing.packed(mask.cpu()))
        assert torch.equal(masks.unpacked(bits, count), mask)
        assert not (masks.unpacked(bits, count).view(torch.uint8) > 1).any()


# --- codes in a few bits --------------------------------------------------------------------------------


@EVERY_CURVE
@pytest.mark.parametrize("dtype", [*SHORT_DTYPES, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_are_those_of_the_cpu_and_the_gradient_a_step_times_dy(
    curve: Curve, dtype: torch.dtype, bits: int
) -> None:
    by = steps(curve, bits)
    x = torch.cat([values(dtype), torch.tensor([torch.nan, torch.inf, -torch.inf])]).to(dtype)
    for part in (x, x[1:], x[:5]):  # and so not at 16 bytes
        packed = codes.packed_codes(part.to(DEVICE), by)
        assert torch.equal(packed.cpu(), code_packing.packed(codes.codes(part, by), bits))
        dy = torch.randn(len(part)).to(dtype)
        dx = codes.scaled(dy.to(DEVICE), packed, by)
        wide = torch.promote_types(dtype, torch.float32)
        expected = dy.to(wide) * torch.tensor(by.values, dtype=wide)[codes.codes(part, by).long()]
        assert same_bits(dx.cpu(), expected.to(dtype))


def test_an_approximate_activation_keeps_its_bits_alone_and_leaves_the_output_stocks() -> None:
    x = torch.randn(64, 8, 6, 10, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = few_bits(x, CURVES["gelu"], 3)
    assert torch.equal(y, F.gelu(x))
    assert y.stride() == x.stride()
    assert [t.untyped_storage().nbytes() for t in kept] == [x.numel() * 3 // 8]
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    table = torch.tensor(steps(CURVES["gelu"], 3).values, device=DEVICE)
    assert torch.equal(dx, table[codes.codes(x.detach(), steps(CURVES["gelu"], 3)).long()])


def same_bits(ours: Tensor, stock: Tensor) -> bool:
    """One NaN is as good as another."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[stock.element_size()]
    return bool(((ours.view(kind) == stock.view(kind)) | (ours.isnan() & stock.isnan())).all())


@pytest.mark.parametrize("dtype", [*SHORT_DTYPES, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.15, 0.45, 0.5, 2 / 3])
def test_a_tensor_dropped_by_bits_is_in_every_bit_what_dropout_gave(dtype: torch.dtype, p: float) -> None:
    short = dtype.itemsize == 2
    x = values(dtype) if short else torch.randn(70001, dtype=dtype)
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan]).to(dtype).repeat(40)
    x = torch.cat([x, odd]).to(DEVICE)
    for part in (x, x[1:], x[: len(x) // 16 * 16].view(4, -1, 4).transpose(0, 1)):
        y, mask = torch.native_dropout(part, p, True)
        bits = masks.packed(mask.as_strided((mask.numel(),), (1,)))
        scale = dropout_scale(1 - p, dtype)
        if DEVICE.type == "cpu":  # whose own dropout has another scale, and rounds it to 16 bits
            part = part.float() if short else part
            y = (part * mask * scale).to(dtype)
        ours = masks.dropped(part, bits, mask.stride(), scale).to(dtype)
        assert ours.stride() == y.stride()
        assert same_bits(ours, y)


@pytest.mark.parametrize("dtype", [*SHORT_DTYPES, torch.float32], ids=str)
def test_a_model_with_dropout_that_is_derived_has_stocks_gradients_in_every_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(
        *(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64), nn.LayerNorm(64), nn.Dropout(0.15)),
        *(nn.Linear(64, 256), nn.SiLU(), nn.Dropout(0.5), nn.Linear(256, 8)),
    ).to(DEVICE, dtype)
    patched, x = copy.deepcopy(stock), torch.randn(32, 64, device=DEVICE, dtype=dtype)
    assert not invact.patch(patched, (x,), exact=True).inverted
    for _ in range(2):
        for model in (stock, patched):
            torch.manual_seed(1)
            model(x).square().mean().backward()
        assert_same_bits_of_gradients(patched, stock)


# --- gated products -----------------------------------------------------------------------------------


class GatedLayer(nn.Module):
    def __init__(self, activation: str) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 192), nn.Linear(64, 192), nn.Linear(192, 64)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated.ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


@pytest.mark.parametrize("name", gated.ACTIVATIONS)
@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
def test_gated_layers_that_are_derived_have_stocks_gradients_in_every_bit(
    name: str, dtype: torch.dtype, record_property
) -> None:
    if DEVICE.type == "cuda":  # if not, two operators do it
        record_property("activations of which one pass has other bits", int(not gated.is_as_stock(name, dtype, DEVICE)))
    torch.manual_seed(0)
    stock = nn.Sequential(GatedLayer(name), nn.LayerNorm(64), GatedLayer(name)).to(DEVICE, dtype)
    patched, x = copy.deepcopy(stock), torch.randn(40, 64, device=DEVICE, dtype=dtype)
    assert not invact.patch(patched, (x,), exact=True).inverted
    for model in (stock, patched):
        for _ in range(2):
            model(x).float().square().mean().backward()
    assert_same_bits_of_gradients(patched, stock)


def assert_same_bits_of_gradients(patched: nn.Module, stock: nn.Module) -> None:
    for ours, theirs in zip(patched.parameters(), stock.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
