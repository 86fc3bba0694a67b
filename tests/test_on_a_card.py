"""What only a card shows: its own operators, streams, layouts and memory. Without one they can run on the CPU too.

Marked `gpu`, so that a usual run leaves them out; `-m gpu` runs them, and `python benchmarks/card` does.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from exactness import (
    SHORT_DTYPES,
    derivative_from_output,
    errors_and_floors,
    every_value,
    stock_gradient,
    ulps,
)
from invact.kernels import CURVES, Curve, codes, forward, gated, masks
from invact.kernels.curves.two_sided import TWO_SIDED, TwoSided
from invact.kernels.few_bits import packing as code_packing
from invact.kernels.few_bits.steps import steps
from invact.kernels.pytorch import packing
from torch import Tensor, nn

import invact
from invact.deriving.rules.dropout import dropout_scale
from invact.inverting.few_bits import few_bits
from invact.inverting.operators import invert
from invact.planning import plans as planning
from invact.pytorch.operators import has_fused_rms_norm
from invact.recognition import norms
from invact.simulation import as_on_gpu

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEEDS_A_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card")
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


# --- training -----------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """An inverted GELU and an inverted SiLU."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.SiLU(), nn.Linear(64, 8, bias=False)).to(
        DEVICE
    )


def stock_and_patched(autocast: torch.dtype | None = None) -> tuple[nn.Module, nn.Module, Tensor]:
    stock = network()
    patched, x = copy.deepcopy(stock), torch.randn(32, 64, device=DEVICE)
    assert len(invact.patch(patched, (x,), autocast=autocast).inverted) == 2
    return stock, patched, x


def gradients(model: nn.Module) -> Tensor:
    parts = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return torch.cat([part.float().flatten() for part in parts])


def assert_same_gradients(patched: nn.Module, stock: nn.Module, within: float = 1e-4) -> None:
    ours, theirs = gradients(patched), gradients(stock)
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= within * theirs.norm()


@NEEDS_A_CARD
def test_a_step_on_a_side_stream_gets_stocks_gradients() -> None:
    stock, patched, x = stock_and_patched()
    stock(x).square().mean().backward()
    side = torch.cuda.Stream()
    for _ in range(20):
        patched.zero_grad()
        own = x.clone()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = patched(own).square().mean()
        own.record_stream(side)
        del own
        torch.randn(32, 64, device=DEVICE)  # may take that memory, were it free too early
        loss.record_stream(torch.cuda.current_stream())
        loss.backward()  # in the streams of the forward
        torch.cuda.current_stream().wait_stream(side)
        assert_same_gradients(patched, stock)


def test_autocast_to_bf16_gets_stocks_gradients_to_bf16() -> None:
    stock, patched, x = stock_and_patched(autocast=torch.bfloat16)
    for model in (stock, patched):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
    assert_same_gradients(patched, stock, within=2e-2)


def test_a_scaler_skips_the_steps_in_fp16_that_it_skips_with_stock() -> None:
    stock, patched, x = stock_and_patched(autocast=torch.float16)
    histories = []
    for model in (stock, patched):
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        scales = []
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, dtype=torch.float16):
                loss = model(30 * x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        histories.append(scales)
    assert histories[0][-1] < 2.0**24  # it did overflow
    assert histories[0] == histories[1]
    assert all(p.isfinite().all() for p in patched.parameters())


def test_a_compiled_patched_model_gets_the_gradients_of_the_eager_one() -> None:
    stock, patched, x = stock_and_patched()
    compiled = torch.compile(patched)
    for model in (stock, compiled):
        model(x).square().mean().backward()
    assert_same_gradients(patched, stock)


def test_moved_to_the_cpu_and_back_a_patched_model_still_gets_stocks_gradients() -> None:
    stock, patched, x = stock_and_patched()
    for device in (torch.device("cpu"), DEVICE):
        for model in (stock, patched):
            model.zero_grad()
            model.to(device)(x.to(device)).square().mean().backward()
        assert_same_gradients(patched, stock)


@contextmanager
def sharding_over_one_process(folder) -> Iterator[Callable[[nn.Module], object]]:
    """FSDP2's `fully_shard` over a mesh of one device."""
    if DEVICE.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 of this PyTorch runs on GPUs alone")
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting_point", rank=0, world_size=1)
    try:
        yield partial(fully_shard, mesh=dist.device_mesh.init_device_mesh(DEVICE.type, (1,)))
    finally:
        dist.destroy_process_group()


def test_sharded_over_one_process_a_patched_model_gets_stocks_gradients(tmp_path) -> None:
    with sharding_over_one_process(tmp_path) as fully_shard:
        stock, patched, x = stock_and_patched()
        fully_shard(patched)
        for model in (stock, patched):
            model(x).square().mean().backward()
        assert_same_gradients(patched, stock)


# --- functions of functions ---------------------------------------------------------------------------


def test_func_grad_and_vmap_agree_with_stock() -> None:
    x = torch.randn(5, 16, device=DEVICE)

    def of_each(activation) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda row: activation(row).square().sum()))(x)

    torch.testing.assert_close(of_each(invact.functional.gelu), of_each(F.gelu), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(of_each(invact.functional.silu), of_each(F.silu), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_second_derivatives_agree_with_stock_away_from_the_minimum(name: str) -> None:
    curve = CURVES[name]
    x = torch.linspace(-0.5, 3, 4096, device=DEVICE, dtype=torch.float32).requires_grad_()

    def second(y: Tensor) -> Tensor:
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    torch.testing.assert_close(second(invert(x, curve)), second(curve.f(x)), atol=1e-3, rtol=1e-3)


# --- deriving ---------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A layer as a Llama has it, and a norm and a linear layer after it: norms, a gated product, dropout, a sum."""

    def __init__(self, width: int, dropout: float, norm: Callable[[int], nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.norm, self.last = norm(width), nn.LayerNorm(width)
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down, self.out = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        inner = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return self.out(self.last(x + F.dropout(inner, self.dropout)))


def derives_and_stock(
    dropout: float = 0.1, autocast: torch.dtype | None = None, exact: bool = False
) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    stock = nn.Sequential(*(Gated(64, dropout) for _ in range(2))).to(DEVICE)
    patched, x = copy.deepcopy(stock), torch.randn(128, 64, device=DEVICE)
    assert len(invact.patch(patched, (x,), autocast=autocast, exact=exact).derived) >= 6
    return stock, patched, x


def step(model: nn.Module, x: Tensor) -> None:
    torch.manual_seed(1)
    (model(x) * torch.linspace(-1, 1, x.shape[1], device=x.device)).sum().backward()


def test_a_step_in_a_thread_of_its_own_derives_and_gets_stocks_gradients() -> None:
    stock, patched, x = derives_and_stock(exact=True)
    step(stock, x)
    torch.manual_seed(1)
    loss = (patched(x) * torch.linspace(-1, 1, x.shape[1], device=DEVICE)).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert torch.equal(gradients(patched), gradients(stock))


@NEEDS_A_CARD
def test_what_is_derived_on_a_side_stream_gets_stocks_gradients() -> None:
    """Recipes run in backward's thread, in the stream of the forward."""
    stock, patched, x = derives_and_stock()
    step(stock, x)
    side = torch.cuda.Stream()
    for _ in range(20):
        patched.zero_grad()
        own = x.clone()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.manual_seed(1)
            loss = (patched(own) * torch.linspace(-1, 1, x.shape[1], device=DEVICE)).sum()
        own.record_stream(side)
        del own
        torch.randn(128, 128, device=DEVICE)  # may take what is made again, were it free too early
        loss.record_stream(torch.cuda.current_stream())
        loss.backward()
        torch.cuda.current_stream().wait_stream(side)
        assert_same_gradients(patched, stock)


@NEEDS_A_CARD
@pytest.mark.parametrize("exact", [False, True])
def test_a_step_that_derives_is_captured_in_a_cuda_graph_and_replays_to_stocks_gradients(exact: bool) -> None:
    stock, patched, x = derives_and_stock(dropout=0.0, exact=exact)
    assert_replays_to_stocks_gradients(patched, stock, x)


def assert_replays_to_stocks_gradients(patched: nn.Module, stock: nn.Module, x: Tensor) -> None:
    """A step captured in a CUDA graph."""
    directions = torch.linspace(-1, 1, x.shape[1], device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            (patched(x) * directions).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    patched.zero_grad(set_to_none=True)
    graph, fixed = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        (patched(fixed) * directions).sum().backward()
    for _ in range(2):
        fixed.copy_(torch.randn_like(x))
        patched.zero_grad(set_to_none=False)
        stock.zero_grad()
        graph.replay()
        step(stock, fixed)
        assert_same_gradients(patched, stock)


@NEEDS_A_CARD
def test_graphed_callables_of_a_model_that_derives_give_stocks_gradients() -> None:
    stock, patched, x = derives_and_stock(dropout=0.0)
    graphed = torch.cuda.make_graphed_callables(patched, (x.clone(),))
    patched.zero_grad()
    step(graphed, x)
    step(stock, x)
    assert_same_gradients(patched, stock)


def test_moved_to_the_cpu_and_back_a_model_that_derives_still_gets_stocks_gradients() -> None:
    stock, patched, x = derives_and_stock(dropout=0.0)
    for device in (torch.device("cpu"), DEVICE):
        for model in (stock, patched):
            model.zero_grad()
            step(model.to(device), x.to(device))
        assert_same_gradients(patched, stock)


@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
def test_under_autocast_what_is_derived_is_stocks_bit_for_bit_with_exact(dtype: torch.dtype) -> None:
    stock, patched, x = derives_and_stock(autocast=dtype, exact=True)
    for model in (stock, patched):
        torch.manual_seed(1)
        with torch.autocast(DEVICE.type, dtype=dtype):
            loss = (model(x).float() * torch.linspace(-1, 1, x.shape[1], device=DEVICE)).sum()
        loss.backward()
    assert torch.equal(gradients(patched), gradients(stock))


def test_a_scaler_takes_the_same_steps_in_fp16_where_a_model_derives() -> None:
    stock, patched, x = derives_and_stock(autocast=torch.float16, exact=True)
    histories = []
    for model in (stock, patched):
        torch.manual_seed(1)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        scales = []
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, dtype=torch.float16):
                loss = model(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        histories.append(scales)
    assert 1 <= histories[0][-1] < 2.0**24  # it did overflow, and then did not
    assert histories[0] == histories[1]
    assert all(torch.equal(*pair) for pair in zip(patched.parameters(), stock.parameters(), strict=True))


def test_sharded_layer_by_layer_a_model_that_derives_gets_stocks_gradients(tmp_path) -> None:
    with sharding_over_one_process(tmp_path) as fully_shard:
        stock, patched, x = derives_and_stock()
        for layer in patched:
            fully_shard(layer)
        fully_shard(patched)
        for model in (stock, patched):
            step(model, x)
        assert_same_gradients(patched, stock)


def small_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(**sizes, vocab_size=256), add_pooling_layer=False)


def small_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=256, attention_dropout=0.1, use_cache=False)
    return LlamaModel(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [small_bert, small_llama])
def test_exact_gives_a_transformer_with_dropout_stocks_gradients_bit_for_bit(make, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = make().to(DEVICE, dtype).train()
    inputs = {"input_ids": torch.randint(0, 256, (4, 64), device=DEVICE)}
    directions = torch.randn(4, 64, 128, device=DEVICE)

    def step_of_it() -> Tensor:
        model.zero_grad()
        torch.manual_seed(1)
        (model(**inputs).last_hidden_state.float() * directions).sum().backward()
        return gradients(model)

    stock = step_of_it()
    if not torch.equal(stock, step_of_it()):
        pytest.skip("stock itself does not give the same bits twice on this card")
    assert invact.patch(model, inputs, exact=True).derived
    assert torch.equal(step_of_it(), stock)


@NEEDS_A_CARD
def test_what_the_allocator_holds_after_forward_falls_by_what_the_report_says(record_property) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Gated(512, 0.1) for _ in range(4))).to(DEVICE, torch.bfloat16)
    x = torch.randn(8192, 512, device=DEVICE, dtype=torch.bfloat16)

    held_by_forward(model, (x,))
    stock = held_by_forward(model, (x,))
    report = invact.patch(model, (x,))
    held_by_forward(model, (x,))
    off = (stock - held_by_forward(model, (x,))) / (report.bytes_before - report.bytes_after) - 1
    record_property("bytes held after forward, off from the report", abs(off))
    assert report.saving > 0.4
    assert abs(off) < 0.01


def held_by_forward(model: nn.Module, inputs: tuple[Tensor, ...] | dict[str, Tensor]) -> int:
    """Bytes that the allocator holds after it; a step is taken to its end."""
    before = torch.cuda.memory_allocated()
    output = model(**inputs)[0] if isinstance(inputs, dict) else model(*inputs)
    held = torch.cuda.memory_allocated() - before
    output.sum().backward()
    model.zero_grad()
    return held


# --- fused norms ------------------------------------------------------------------------------------


def llama_with_norms(width: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**sizes_of_decoder(width)))


def gemma_with_norms(width: int) -> nn.Module:
    from transformers import GemmaConfig, GemmaModel

    return GemmaModel(GemmaConfig(**sizes_of_decoder(width), head_dim=width // 4, pad_token_id=0))


def t5_with_norms(width: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": width, "d_kv": width // 4, "d_ff": 2 * width, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(**sizes, vocab_size=256, dropout_rate=0.0))


def sizes_of_decoder(width: int) -> dict[str, int | bool]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    return {"vocab_size": 256, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, **heads}


WITH_NORMS = pytest.mark.parametrize("make", [llama_with_norms, gemma_with_norms, t5_with_norms])
NORMS = 5  # of each


def with_norms(
    make: Callable[[int], nn.Module], width: int, batch: int, tokens: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """In bf16, its norms with weights of their own, and its inputs."""
    torch.manual_seed(0)
    model = make(width).to(DEVICE, torch.bfloat16).train()
    vary_weights_of_norms(model)
    return model, {"input_ids": torch.randint(1, 256, (batch, tokens), device=DEVICE)}


def vary_weights_of_norms(model: nn.Module) -> None:
    for module in model.modules():
        if "Norm" in type(module).__name__:
            nn.init.normal_(module.weight, 0.8, 0.2)


@pytest.fixture
def fused_here(monkeypatch) -> None:
    """On a CPU it is as if the fused operator were one kernel there: what runs is PyTorch's own composition of it."""
    if DEVICE.type == "cpu":
        for module in (norms, planning, as_on_gpu):
            monkeypatch.setattr(module, "has_fused_rms_norm", lambda device: True)
    elif not has_fused_rms_norm(DEVICE):
        pytest.skip("this PyTorch has no fused RMS norm for GPUs")


def fused_nodes(output: Tensor) -> int:
    """How many nodes of the output's graph are fused norms."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [function for function, _ in node.next_functions]
    return sum(node.name() == "FusedRmsNormBackward0" for node in seen)


@NEEDS_A_CARD
@WITH_NORMS
def test_every_norm_in_steps_is_one_node_of_the_graph(make, fused_here) -> None:
    model, inputs = with_norms(make, 128, 4, 64)
    assert len(invact.patch(model, inputs).fused) == NORMS
    assert fused_nodes(model(**inputs)[0]) == NORMS
    invact.unpatch(model)
    assert fused_nodes(model(**inputs)[0]) == 0


@WITH_NORMS
def test_nothing_is_fused_with_exact(make, fused_here) -> None:
    model, inputs = with_norms(make, 128, 4, 64)
    assert not invact.patch(model, inputs, exact=True).fused
    assert fused_nodes(model(**inputs)[0]) == 0


@WITH_NORMS
def test_gradients_through_fused_norms_are_as_near_to_float64s_as_stocks(make, fused_here, record_property) -> None:
    model, inputs = with_norms(make, 128, 4, 64)
    directions = torch.randn(4, 64, 128, device=DEVICE)

    def gradients_of(model: nn.Module) -> Tensor:
        model.zero_grad()
        (model(**inputs)[0] * directions).sum().backward()
        return gradients(model)

    true = gradients_of(copy.deepcopy(model).double())
    stock = gradients_of(model)
    assert len(invact.patch(model, inputs).fused) == NORMS
    farther = ((gradients_of(model) - true).norm() / (stock - true).norm()).item()
    record_property("error of gradients through fused norms, x stock's", farther)
    assert farther <= 1.25


@NEEDS_A_CARD
@WITH_NORMS
def test_with_fused_norms_what_the_allocator_holds_falls_by_what_the_report_says(
    make, fused_here, record_property
) -> None:
    model, inputs = with_norms(make, 512, 8, 512)
    held_by_forward(model, inputs)
    stock = held_by_forward(model, inputs)
    report = invact.patch(model, inputs)
    assert len(report.fused) == NORMS
    held_by_forward(model, inputs)
    off = (stock - held_by_forward(model, inputs)) / (report.bytes_before - report.bytes_after) - 1
    record_property("bytes held with fused norms, off from the report", abs(off))
    assert abs(off) < 0.01


def stock_and_fused(stock: nn.Module) -> tuple[nn.Module, nn.Module, Tensor]:
    """In fp32, with two norms."""
    vary_weights_of_norms(stock)
    stock.to(DEVICE)
    patched, x = copy.deepcopy(stock), torch.randn(128, 64, device=DEVICE)
    assert len(invact.patch(patched, (x,)).fused) == 2
    return stock, patched, x


def norms_between_products() -> nn.Module:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64), LlamaRMSNorm(64), nn.Linear(64, 64), GemmaRMSNorm(64), nn.Linear(64, 8)))


def test_a_gradient_penalty_through_fused_norms_agrees_with_stock(fused_here) -> None:
    stock, patched, x = stock_and_fused(norms_between_products())
    for model in (stock, patched):
        own = x.clone().requires_grad_()
        y = model(own)
        if DEVICE.type == "cuda":
            assert fused_nodes(y) == (2 if model is patched else 0)
        (dx,) = torch.autograd.grad(y.square().sum(), own, create_graph=True)
        (y.square().mean() + dx.square().mean()).backward()
    assert_same_gradients(patched, stock)


def test_func_grad_around_fused_norms_agrees_with_stock(fused_here) -> None:
    stock, patched, x = stock_and_fused(norms_between_products())

    def of(model: nn.Module) -> dict[str, Tensor]:
        def loss(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, weights, (x,)).square().mean()

        return torch.func.grad(loss)(dict(model.named_parameters()))

    torch.testing.assert_close(of(patched), of(stock))


@NEEDS_A_CARD
def test_a_step_with_fused_norms_is_captured_in_a_cuda_graph_and_replays_to_stocks_gradients(fused_here) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    stock, patched, x = stock_and_fused(nn.Sequential(Gated(64, 0.0, LlamaRMSNorm), Gated(64, 0.0, GemmaRMSNorm)))
    assert_replays_to_stocks_gradients(patched, stock, x)


# --- last, for a wrong address would end whatever comes after it -------------------------------------


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
