"""Patched models on a card: streams, scalers, compiled, sharded over one process, functions of functions."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from on_a_card import DEVICE, NEEDS_A_CARD, assert_same_gradients, sharding_over_one_process
from torch import Tensor, nn

import invact
from invact.inverting.autograd_functions import invert
from invact.kernels import CURVES

pytestmark = pytest.mark.gpu


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
