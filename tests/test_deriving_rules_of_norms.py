"""Entries of `invact.deriving.rules` for norms and softmax: the same bits, laid out as they were."""

import pytest
import torch
import torch.nn.functional as F
from operator_cases import NORMS
from operator_checks import (
    BF16,
    DOUBLE,
    FLOAT,
    FP16,
    LAYOUTS,
    SHAPE,
    assert_same,
    aten,
    channels_last,
    check,
    kept_for,
    leaf,
    transposed,
)
from torch import nn

from invact.deriving.handles import Derived, Kept
from invact.deriving.hooks import Deriving

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT, BF16, FP16])
def test_norms(name, dtype):
    norm, shape = NORMS[name]
    if name == "batch norm in eval mode" and dtype is not FLOAT:
        pytest.skip("running statistics are those of fp32 here")
    w, b = torch.rand(shape).to(dtype), torch.randn(shape).to(dtype)
    for layout in LAYOUTS:
        if name == "rms norm" and layout is transposed and dtype.itemsize == 2:
            continue  # a CPU copies it first and adds up the copy, of which nothing tells how it lies
        x = layout(dtype)
        for eps in (1e-5, 1e-2, 0.3):
            check(lambda x, w, b, eps=eps: norm(x, w, b, eps), x, w, b)
        for frozen in ((1,), (0,)) if name == "rms norm" else ((1,), (2,), (1, 2), (0,), (0, 1)):
            if (name, layout) == ("group norm", channels_last) and 0 in frozen:
                continue  # PyTorch 2.8 itself breaks down there
            check(lambda x, w, b: norm(x, w, b, 1e-3), x, w, b, frozen=frozen)
        check(lambda x, w: norm(x, w, None, 1e-3), x, w)
        check(lambda x: norm(x, None, None, 1e-3), x)


def test_a_norm_with_a_bias_alone():
    b = torch.randn(11)
    check(lambda x, b: F.layer_norm(x, (11,), None, b), torch.randn(SHAPE), b, name="NativeLayerNormBackward0")


def test_eps_is_read_at_each_call():
    norm, x = nn.LayerNorm(64), leaf(torch.randn(32, 64))
    for eps in (1e-5, 0.1, 1e-3):
        norm.eps = eps
        with Deriving():
            y = norm(x)
            handle = kept_for(y)
        assert type(handle) is Derived
        with torch.no_grad():
            assert_same(handle.made(), y.detach())


def test_a_norm_called_by_another_way_than_its_function_is_kept():
    x = leaf(torch.randn(32, 64))
    with Deriving():
        assert type(kept_for(torch.layer_norm(x, (64,)))) is Kept


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_move_once(kind, training):
    shape = {nn.BatchNorm1d: (32, 6, 9), nn.BatchNorm2d: (8, 6, 9, 11), nn.BatchNorm3d: (4, 6, 5, 4, 3)}[kind]
    ours, stock = kind(6).train(training), kind(6).train(training)
    x = torch.randn(shape)
    with Deriving():
        y = ours(leaf(x)).relu()
        (y * y).sum().backward()
    y = stock(leaf(x)).relu()
    (y * y).sum().backward()
    for a, b in zip(ours.state_dict().values(), stock.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.weight.grad, stock.weight.grad)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax(dim):
    for dtype in (DOUBLE, FLOAT, BF16, FP16):
        x = torch.randn(SHAPE).to(dtype)
        check(lambda x: torch.softmax(x, dim), x, name="SoftmaxBackward0")
        check(lambda x: torch.log_softmax(x, dim), x, name="LogSoftmaxBackward0")
        check(lambda x: torch.softmax(x.neg(), dim, dtype=FLOAT), x, name="SoftmaxBackward0")
        check(lambda x: aten._safe_softmax(x, dim), x, name="SafeSoftmaxBackward0")


def test_softmax_of_rows_without_a_number():
    x = torch.cat([torch.full(SHAPE, -torch.inf)[:1], torch.randn(SHAPE)[1:]])
    check(lambda x: aten._safe_softmax(x, -1), x, name="SafeSoftmaxBackward0")


@pytest.mark.parametrize("name", ["mean", "sum", "var"])
def test_what_a_norm_in_steps_takes_off_is_made_on_the_way(name):
    for dtype in (FLOAT, BF16):
        for dim in (-1, 1):
            check(lambda x, dim=dim: x * getattr(x, name)(dim, keepdim=True).neg(), torch.randn(SHAPE).to(dtype))
            check(
                lambda x, dim=dim: x - getattr(x, name)(dim, keepdim=True),
                torch.randn(SHAPE).to(dtype),
                name="SubBackward0",
            )


def test_a_row_s_mean_that_is_kept_itself_stays_and_more_than_a_row_is_not_summed_up():
    x = leaf(torch.randn(64, 32, 4))
    with Deriving():
        assert type(kept_for(x.mean(-1, keepdim=True))) is Kept
        assert type(kept_for(x - x.mean((0, 1), keepdim=True))) is Kept
        assert type(kept_for(x - x.sum())) is Kept


def test_a_weight_that_is_normed():
    for dtype in (DOUBLE, FLOAT):
        for dim, shape in ((0, (40, 1)), (1, (1, 60))):
            check(
                lambda v, g, dim=dim: torch._weight_norm(v, g, dim),
                torch.randn(40, 60).to(dtype),
                torch.rand(shape).to(dtype),
            )
