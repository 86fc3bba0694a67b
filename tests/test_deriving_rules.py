"""Every entry of `invact.deriving.rules`: what it makes is what the operator gave, in every bit, laid out as it was."""

import contextlib
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from invact.deriving.asking import kept_by
from invact.deriving.handles import Derived, Kept
from invact.deriving.hooks import SMALLEST, Deriving
from invact.deriving.masks import Bits, PackedMask
from invact.deriving.rules.registry import RULES
from invact.pytorch.saved_tensor_hooks import shows_what_is_kept

aten = torch.ops.aten
DOUBLE, FLOAT, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SHAPE = (3, 6, 9, 11)  # 1,782 elements, with a rest behind the last whole vector
# What a CPU has no kernel for.
GPU_ONLY = {"CudnnBatchNormBackward0", "FusedRmsNormBackward0", "MiopenBatchNormBackward0"}

pytestmark = pytest.mark.usefixtures("one_thread")


# --- what is given and compared -------------------------------------------------------------------------


def leaf(values):
    return values.detach().requires_grad_()


def uniform(shape, dtype, low, high):
    return (low + (high - low) * torch.rand(shape)).to(dtype)


def contiguous(dtype, low=-4, high=4):
    return uniform(SHAPE, dtype, low, high)


def channels_last(dtype, low=-4, high=4):
    return uniform(SHAPE, dtype, low, high).contiguous(memory_format=torch.channels_last)


def transposed(dtype, low=-4, high=4):
    return uniform((9, 11, 3, 6), dtype, low, high).permute(2, 3, 0, 1)


def sliced(dtype, low=-4, high=4):
    return uniform((3, 6, 9, 22), dtype, low, high)[..., ::2]


def broadcast(dtype, low=-4, high=4):
    return uniform((3, 6, 1, 11), dtype, low, high).expand(SHAPE)


LAYOUTS = [contiguous, channels_last, transposed, sliced, broadcast]


def in_bits(tensor):
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.contiguous().view(kind[tensor.element_size()])


def assert_same(ours, stock):
    """In dtype, shape, strides and every bit; one NaN is as good as another."""
    assert (ours.dtype, ours.shape, ours.stride()) == (stock.dtype, stock.shape, stock.stride())
    if stock.is_complex():
        ours, stock = torch.view_as_real(ours), torch.view_as_real(stock)
    alike = (in_bits(ours) == in_bits(stock)) | (ours.isnan() & stock.isnan())
    assert alike.all(), f"{(~alike).sum()} of {stock.numel()} differ"


def kept_for(tensor):
    """What is kept of a tensor that the next operator wants."""
    return kept_by((tensor * tensor).grad_fn, "self")


def gradients(make, inputs, consume):
    """Of all inputs, for a loss in which the output is kept."""
    output = make(*inputs)
    seen = consume(output) if consume else None
    loss = (output * output).abs().sum()
    wanted = [each for each in inputs if each.requires_grad]
    return output, seen, torch.autograd.grad(loss, wanted, allow_unused=True)


def check(make, *values, name=None, frozen=()):
    """Asserts that the output of `make` is derived, and equal to the original, and that gradients are stock's.

    Args:
        make: a function of the tensors `values`, whose last operator is the one that is tried.
        name: of its node.
        frozen: places among the values of those that need no gradient.
    """
    inputs = [each.detach() if place in frozen else leaf(each) for place, each in enumerate(values)]
    torch.manual_seed(1)
    _, _, expected = gradients(make, inputs, None)
    torch.manual_seed(1)
    with Deriving():
        output, handle, found = gradients(make, inputs, kept_for)
    if name is not None:
        assert output.grad_fn.name() == name
    assert isinstance(handle, Derived)
    with torch.no_grad():
        for _ in range(2):  # as for a graph that is run again
            assert_same(handle.made(), output.detach())
    for ours, stock in zip(found, expected, strict=True):
        assert (ours is None) == (stock is None)
        if stock is not None:
            assert_same(ours, stock)


# --- one tensor, element by element ---------------------------------------------------------------------

# By entry: a function, and the range in which it is tried.
ONE = {
    "AbsBackward0": (torch.abs, -4, 4),
    "AcosBackward0": (torch.acos, -1.1, 1.1),
    "AcoshBackward0": (torch.acosh, 0.5, 9),
    "AsinBackward0": (torch.asin, -1.1, 1.1),
    "AsinhBackward0": (torch.asinh, -9, 9),
    "AtanBackward0": (torch.atan, -4, 4),
    "AtanhBackward0": (torch.atanh, -1.1, 1.1),
    "CeilBackward0": (torch.ceil, -4, 4),
    "CeluBackward0": (lambda x: F.celu(x, 0.7), -4, 4),
    "CeluBackward1": (lambda x: F.celu(x.neg(), 0.7, inplace=True), -4, 4),
    "ClampBackward1": (lambda x: x.clamp(-1.5, 0.3), -4, 4),
    "ClampMaxBackward0": (lambda x: x.clamp_max(0.3), -4, 4),
    "ClampMinBackward0": (lambda x: x.clamp_min(0.3), -4, 4),
    "CosBackward0": (torch.cos, -9, 9),
    "CoshBackward0": (torch.cosh, -4, 4),
    "EluBackward0": (lambda x: F.elu(x, 1.3), -4, 4),
    "EluBackward1": (lambda x: F.selu(x.neg(), inplace=True), -4, 4),
    "ErfBackward0": (torch.erf, -4, 4),
    "ErfcBackward0": (torch.erfc, -4, 4),
    "ErfinvBackward0": (torch.erfinv, -1.1, 1.1),
    "Exp2Backward0": (torch.exp2, -9, 9),
    "ExpBackward0": (torch.exp, -9, 9),
    "Expm1Backward0": (torch.expm1, -4, 4),
    "FloorBackward0": (torch.floor, -4, 4),
    "FracBackward0": (torch.frac, -4, 4),
    "GeluBackward0": (F.gelu, -8, 4),
    "HardshrinkBackward0": (lambda x: F.hardshrink(x, 0.7), -4, 4),
    "HardsigmoidBackward0": (F.hardsigmoid, -4, 4),
    "HardswishBackward0": (F.hardswish, -4, 4),
    "HardtanhBackward0": (lambda x: F.hardtanh(x, -0.5, 2.0), -4, 4),
    "LeakyReluBackward0": (lambda x: F.leaky_relu(x, 0.2), -4, 4),
    "LeakyReluBackward1": (lambda x: F.leaky_relu(x.neg(), 0.2, inplace=True), -4, 4),
    "Log10Backward0": (torch.log10, -0.1, 9),
    "Log1PBackward0": (torch.log1p, -1.1, 9),
    "Log2Backward0": (torch.log2, -0.1, 9),
    "LogBackward0": (torch.log, -0.1, 9),
    "LogSigmoidBackward0": (F.logsigmoid, -9, 9),
    "LogitBackward0": (lambda x: torch.logit(x, 1e-3), -0.1, 1.1),
    "MishBackward0": (F.mish, -9, 9),
    "NegBackward0": (torch.neg, -4, 4),
    "PowBackward0": (lambda x: x**3, -4, 4),
    "ReciprocalBackward0": (torch.reciprocal, -4, 4),
    "ReluBackward0": (torch.relu, -4, 4),
    "RoundBackward0": (torch.round, -4, 4),
    "RsqrtBackward0": (torch.rsqrt, -0.1, 9),
    "SgnBackward0": (torch.sgn, -4, 4),
    "SigmoidBackward0": (torch.sigmoid, -9, 9),
    "SignBackward0": (torch.sign, -4, 4),
    "SiluBackward0": (F.silu, -9, 9),
    "SinBackward0": (torch.sin, -9, 9),
    "SincBackward0": (torch.sinc, -4, 4),
    "SinhBackward0": (torch.sinh, -4, 4),
    "SoftplusBackward0": (lambda x: F.softplus(x, 2.0, 3.0), -4, 4),
    "SoftshrinkBackward0": (lambda x: F.softshrink(x, 0.7), -4, 4),
    "SqrtBackward0": (torch.sqrt, -0.1, 9),
    "TanBackward0": (torch.tan, -4, 4),
    "TanhBackward0": (torch.tanh, -4, 4),
    "TrilBackward0": (lambda x: x.tril(1), -4, 4),
    "TriuBackward0": (lambda x: x.triu(-1), -4, 4),
    "TruncBackward0": (torch.trunc, -4, 4),
}


@pytest.mark.parametrize("name", ONE)
def test_operators_of_one_tensor_in_every_dtype_and_layout(name):
    function, low, high = ONE[name]
    for dtype in (DOUBLE, FLOAT, BF16, FP16):
        for layout in LAYOUTS:
            x = layout(dtype, low, high)
            check(function, x, name=name)
            # Where the operator does not keep what it read, that is a step on the way.
            check(lambda x: function(x.transpose(1, 2).contiguous().neg()), x, name=name)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", ONE)
def test_operators_of_one_tensor_at_every_value_of_16_bits(name, dtype):
    function, _, _ = ONE[name]
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    with Deriving():
        output = function(leaf(x))
        handle = kept_for(output)
    assert type(handle) is Derived
    with torch.no_grad():
        assert_same(handle.made(), output.detach())


SETTINGS = [
    lambda x: F.celu(x, 2.0),
    lambda x: x.clamp(min=-1),
    lambda x: x.clamp(max=1, min=None),
    lambda x: F.elu(x, 0.2),
    F.selu,
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: F.hardtanh(x, 0.0, 6.0),
    F.relu6,
    F.leaky_relu,
    torch.logit,
    lambda x: x**2,
    lambda x: x.pow(-0.5),
    torch.square,
    F.softplus,
    lambda x: x.tril(-2),
]


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_settings(number):
    for dtype in (FLOAT, BF16):
        check(SETTINGS[number], torch.randn(SHAPE).to(dtype))


IN_PLACE = {
    "celu": lambda x: F.celu(x, 0.7, inplace=True),
    "elu": lambda x: F.elu(x, 1.3, inplace=True),
    "exp_": torch.exp_,
    "expm1_": lambda x: x.expm1_(),
    "hardsigmoid": lambda x: F.hardsigmoid(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 2.0, inplace=True),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2, inplace=True),
    "mish": lambda x: F.mish(x, inplace=True),
    "reciprocal_": lambda x: x.reciprocal_(),
    "relu": lambda x: F.relu(x, inplace=True),
    "relu6": lambda x: F.relu6(x, inplace=True),
    "relu_": torch.relu_,
    "rsqrt_": lambda x: x.rsqrt_(),
    "selu": lambda x: F.selu(x, inplace=True),
    "sigmoid_": torch.sigmoid_,
    "silu": lambda x: F.silu(x, inplace=True),
    "sqrt_": lambda x: x.sqrt_(),
    "tanh_": torch.tanh_,
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_activations_that_work_in_place(name):
    for dtype in (DOUBLE, FLOAT, BF16, FP16):
        for layout in LAYOUTS[:3]:
            check(lambda x: IN_PLACE[name](x.neg()), layout(dtype))


CHANGED = {
    "x += y": lambda x, y: x.__iadd__(y),
    "x -= y": lambda x, y: x.__isub__(y),
    "x *= y": lambda x, y: x.__imul__(y),
    "x /= y": lambda x, y: x.__itruediv__(y),
    "x *= 3": lambda x, y: x.__imul__(3),
    "x[:, 0] = y": lambda x, y: x.__setitem__((slice(None), 0), y[:, 0]) or x,
    "masked": lambda x, y: x.masked_fill_(y > 0, 2.0),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_is_changed_in_place_is_never_taken_for_what_it_was(name):
    """Of the operator and of those behind it, whether the output is derived or not."""
    x, y = leaf(torch.randn(SHAPE)), leaf(torch.randn(SHAPE))
    for behind in (lambda x: x, torch.tanh, torch.neg, lambda x: x.transpose(0, 1)):

        def make(x, y, behind=behind):
            return behind(CHANGED[name](x.neg(), y))

        _, _, expected = gradients(make, [x, y], None)
        with Deriving():
            output, handle, found = gradients(make, [x, y], kept_for)
        with torch.no_grad():
            assert_same(handle.made(), output.detach())
        for ours, stock in zip(found, expected, strict=True):
            assert ours is stock or torch.equal(ours, stock)


@pytest.mark.xfail(strict=True, reason="nothing in the graph tells it, on the way to another tensor")
def test_what_is_changed_behind_autograd_s_back_is_not_taken_for_what_it_was():
    x = leaf(torch.randn(SHAPE))
    with Deriving():
        y = x.neg()
        with torch.no_grad():
            y.clamp_(min=0.0)
        z = y.tanh()
        handle = kept_for(z)
    with torch.no_grad():
        assert_same(handle.made(), z.detach())


# --- several tensors ------------------------------------------------------------------------------------

SEVERAL = {
    "AddBackward0": lambda x, y: torch.add(x, y, alpha=0.3),
    "AddcdivBackward0": lambda x, y: torch.addcdiv(x, y, x, value=0.3),
    "AddcmulBackward0": lambda x, y: torch.addcmul(x, y, x, value=0.3),
    "Atan2Backward0": torch.atan2,
    "ClampBackward0": lambda x, y: torch.clamp(x, y, x + y),
    "ClampMaxBackward1": torch.clamp_max,
    "ClampMinBackward1": torch.clamp_min,
    "CopysignBackward0": torch.copysign,
    "DivBackward0": torch.div,
    "DivBackward2": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "FmaxBackward0": torch.fmax,
    "FminBackward0": torch.fmin,
    "FmodBackward1": torch.fmod,
    "HypotBackward0": torch.hypot,
    "LerpBackward0": lambda x, y: torch.lerp(x, y.expand_as(x), 0.3),
    "LerpBackward1": lambda x, y: torch.lerp(x, y.expand_as(x), x),
    "Logaddexp2Backward0": torch.logaddexp2,
    "LogaddexpBackward0": torch.logaddexp,
    "MaximumBackward0": torch.maximum,
    "MinimumBackward0": torch.minimum,
    "MulBackward0": torch.mul,
    "PowBackward1": torch.pow,
    "PowBackward2": lambda x, y: 2.5**x,
    "PreluKernelBackward0": lambda x, y: F.prelu(x - y, y[0, :, 0, 0]),
    "RemainderBackward1": torch.remainder,
    "SubBackward0": lambda x, y: torch.sub(x, y, alpha=0.3),
    "WhereBackward0": lambda x, y: torch.where(x > 0.5, x, y),
    "XlogyBackward0": torch.xlogy,
}


@pytest.mark.parametrize("name", SEVERAL)
def test_operators_of_several_tensors(name):
    for dtype in (DOUBLE, FLOAT, BF16, FP16):
        for layout in LAYOUTS:
            for other in (
                torch.rand(SHAPE).to(dtype),
                torch.rand(1, 6, 9, 11).to(dtype),
                torch.rand(3, 6, 9, 1).to(dtype),
            ):
                check(SEVERAL[name], layout(dtype), other, name=name)
        if name in {"HypotBackward0", "XlogyBackward0", "CopysignBackward0"}:
            continue


NUMBERS = {
    "times": lambda x: x * 2.5,
    "times a whole number": lambda x: 3 * x,
    "by": lambda x: x / 7,
    "by a number in a tensor": lambda x: x / torch.tensor(7.0, dtype=DOUBLE),
    "one over": lambda x: 1 / x,
    "times what is small": lambda x: x * (x[0, 0, 0, 0] * 2.5),  # a number times a tensor without dimensions
    "power": lambda x: 2**x,
}


@pytest.mark.skipif(not shows_what_is_kept, reason="PyTorch 2.8 and 2.9 tell nobody of the numbers that a node keeps")
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_among_the_operands(name):
    for dtype in (DOUBLE, FLOAT, BF16, FP16):
        check(NUMBERS[name], torch.randn(SHAPE).to(dtype))


def test_operands_of_two_dtypes_and_those_that_need_no_gradient():
    x, y = torch.randn(SHAPE), torch.randn(SHAPE).bfloat16()
    for function in (torch.mul, torch.div, torch.add, torch.maximum):
        check(function, x, y)
        check(function, y, x)
    check(torch.mul, x, y, frozen=(1,))
    check(torch.div, x, y, frozen=(0,))
    check(torch.pow, x.abs(), y, frozen=(1,))
    check(lambda x, y: torch.where(y > 0, x, x.exp()), x, y, frozen=(1,))


def test_a_sum_of_sums_is_kept():
    """Else a stream of residuals would be summed up from its start."""
    a, b, c = (leaf(torch.randn(SHAPE)) for _ in range(3))
    for function in (torch.add, torch.sub, lambda x, c: torch.addcmul(x, c, c), lambda x, c: torch.lerp(x, c, 0.5)):
        with Deriving():
            first = a + b
            assert type(kept_for(function(first, c))) is Kept


def test_what_is_filled_in():
    for dtype in (FLOAT, BF16):
        fill = torch.tensor(0.5, dtype=dtype)
        check(
            lambda x, fill: x.masked_fill(x > 0, fill), torch.randn(SHAPE).to(dtype), fill, name="MaskedFillBackward1"
        )


def test_what_autograd_does_not_record_is_kept():
    x = leaf(torch.randn(SHAPE))
    for function in (
        lambda x: x + 1.0,
        lambda x: 1 - x,
        lambda x: x.masked_fill(x > 0, 2.0),
        lambda x: torch.where(x > 0, x, 2.0),
        lambda x: F.threshold(x, 0.5, 20.0),
        lambda x: x + torch.ones(SHAPE),
        lambda x: torch.nan_to_num(x, 3.0),
    ):
        with Deriving():
            output = function(x)
            assert type(kept_for(output)) is Kept


# --- norms and softmax ----------------------------------------------------------------------------------


class Norm(NamedTuple):
    make: object
    weight_shape: tuple


C = 6
NORMS = {
    "layer norm": Norm(lambda x, w, b, eps: F.layer_norm(x, (11,), w, b, eps), (11,)),
    "layer norm of two dimensions": Norm(lambda x, w, b, eps: F.layer_norm(x, (9, 11), w, b, eps), (9, 11)),
    "group norm": Norm(lambda x, w, b, eps: F.group_norm(x, 2, w, b, eps), (C,)),
    "batch norm": Norm(lambda x, w, b, eps: F.batch_norm(x, None, None, w, b, True, 0.1, eps), (C,)),
    "batch norm in eval mode": Norm(
        lambda x, w, b, eps: F.batch_norm(x, torch.arange(6.0), torch.arange(1.0, 7), w, b, False, 0.1, eps), (C,)
    ),
    "instance norm": Norm(
        lambda x, w, b, eps: F.instance_norm(x, None, None, w, b, eps=eps),
        (C,),
    ),
    "rms norm": Norm(lambda x, w, b, eps: F.rms_norm(x, (11,), w, eps), (11,)),
}


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


# --- what moves -----------------------------------------------------------------------------------------

MOVED = {
    "AliasBackward0": aten.alias,
    "AvgPool2DBackward0": lambda x: F.avg_pool2d(x, 2, 1, 1, False, False),
    "CatBackward0": lambda x: torch.cat([x, x.neg()], -1),
    "ChannelShuffleBackward0": lambda x: F.channel_shuffle(x, 3),
    "CloneBackward0": torch.clone,
    "ConstantPadNdBackward0": lambda x: F.pad(x, (1, 2, 0, 3), value=0.7),
    "DiagonalBackward0": lambda x: x.repeat(4, 1, 9, 1).diagonal(1, 0, 3),
    "ExpandBackward0": lambda x: x.unsqueeze(1).expand(3, 2, 6, 9, 11),
    "FlipBackward0": lambda x: x.flip(1, -1),
    "GluBackward0": lambda x: F.glu(torch.cat([x, x.neg()], 1), 1),
    "Im2ColBackward0": lambda x: F.unfold(x, (2, 3), 1, 1, 2),
    "PermuteBackward0": lambda x: x.permute(0, 3, -2, 1),
    "PixelShuffleBackward0": lambda x: F.pixel_shuffle(torch.cat([x, x], 1), 2),
    "PixelUnshuffleBackward0": lambda x: F.pixel_unshuffle(x[:, :, :, :9], 3),
    "ReflectionPad1DBackward0": lambda x: F.pad(x[:, :, 0].repeat(6, 1, 1), (1, 2), mode="reflect"),
    "ReflectionPad2DBackward0": lambda x: F.pad(x, (1, 2, 3, 4), mode="reflect"),
    "ReflectionPad3DBackward0": lambda x: F.pad(x[None], (1, 2, 3, 4, 1, 1), mode="reflect"),
    "RepeatBackward0": lambda x: x.repeat(1, 2, 1, 1),
    "ReplicationPad1DBackward0": lambda x: F.pad(x[:, :, 0].repeat(6, 1, 1), (1, 2), mode="replicate"),
    "ReplicationPad2DBackward0": lambda x: F.pad(x, (1, 2, 3, 4), mode="replicate"),
    "ReplicationPad3DBackward0": lambda x: F.pad(x[None], (1, 2, 3, 4, 1, 1), mode="replicate"),
    "ReshapeAliasBackward0": lambda x: aten._reshape_alias(x.contiguous(), (18, 99), (99, 1)),
    "RollBackward0": lambda x: x.roll((-1, 2), (1, 3)),
    "Rot90Backward0": lambda x: torch.rot90(x, 3, (1, -1)),
    "SelectBackward0": lambda x: x.repeat(1, 1, 9, 1).select(3, -2).repeat(1, 9, 1).unsqueeze(1).select(1, -1),
    "SliceBackward0": lambda x: x[:, 1:-1],
    "SplitBackward0": lambda x: x.split(4, 1)[0],
    "SplitWithSizesBackward0": lambda x: x.split((2, 4), -3)[1],
    "SqueezeBackward0": lambda x: x[None].squeeze(),
    "SqueezeBackward1": lambda x: x[None].squeeze(0),
    "SqueezeBackward2": lambda x: x[None, None].squeeze((0, -5)),
    "StackBackward0": lambda x: torch.stack([x, x.neg()], -1),
    "ToCopyBackward0": lambda x: x.to(FLOAT if x.dtype is not FLOAT else BF16),
    "TransposeBackward0": lambda x: x.transpose(-1, 1),
    "UnbindBackward0": lambda x: torch.stack([x, x], 1).unbind(1)[1],
    "UnfoldBackward0": lambda x: x.unfold(-1, 3, 2),
    "UnsafeSplitBackward0": lambda x: torch.unsafe_split(x, 4, 1)[0],
    "UnsafeSplitWithSizesBackward0": lambda x: torch.unsafe_split_with_sizes(x, (2, 4), 1)[1],
    "UnsafeViewBackward0": lambda x: aten._unsafe_view(x.contiguous(), (18, 99)),
    "UnsqueezeBackward0": lambda x: x.unsqueeze(-2),
    "UpsampleBilinear2DBackward0": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear", align_corners=True),
    "UpsampleNearest1DBackward0": lambda x: F.interpolate(x[:, :, 0].repeat(6, 1, 1), scale_factor=2.3),
    "UpsampleNearest2DBackward0": lambda x: F.interpolate(x, scale_factor=(2, 1.5)),
    "UpsampleNearest3DBackward0": lambda x: F.interpolate(x[None], size=(9, 9, 14)),
    "UpsampleNearestExact2DBackward0": lambda x: F.interpolate(x, size=(12, 17), mode="nearest-exact"),
    "ViewBackward0": lambda x: x.contiguous().neg().view(3, 2, 3, -1),
}
COMPLEX = {
    "ComplexBackward0": lambda x: torch.complex(x, x.neg()),
    "ViewAsComplexBackward0": lambda x: torch.view_as_complex(torch.stack([x, x.neg()], -1)),
    "ViewAsRealBackward0": lambda x: torch.view_as_real(torch.complex(x, x)),
}


@pytest.mark.parametrize("name", MOVED)
def test_what_moves(name):
    for dtype in (DOUBLE, FLOAT, BF16, FP16):
        for layout in LAYOUTS:
            check(lambda x: MOVED[name](x.neg()), layout(dtype), name=name)


def test_the_transposed_is_a_step_on_the_way_and_kept_itself_as_the_weights_of_linear_layers_are():
    x = torch.randn(40, 60)
    check(lambda x: x.neg().t().tanh(), x)
    with Deriving():
        assert type(kept_for(leaf(x).neg().t())) is Kept


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers(name):
    for dtype in (DOUBLE, FLOAT):
        check(COMPLEX[name], torch.randn(SHAPE).to(dtype), name=name)
    check(lambda x: torch.complex(x, x) * torch.complex(x.neg(), x), torch.randn(SHAPE))


@pytest.mark.parametrize(
    "pad", [(1, 2), (0, 0, 2, 0), (0, 1, -1, 0), (-1, 2, 0, -2, 0, 1), (0, 0), (-1, -2), (0, 0, 0, 0, 0, 0, 1, 0)]
)
@pytest.mark.parametrize("value", [0.0, -0.0, -3.5, float("nan"), float("-inf")])
def test_padding_with_a_number(pad, value):
    for layout in LAYOUTS[:3]:
        check(lambda x: F.pad(x, pad, value=value), layout(FLOAT))


def test_padding_by_nothing_on_the_way():
    check(lambda x: F.pad(x, (0, 0, 0, 0)).tanh(), torch.randn(SHAPE))
    with Deriving():
        assert type(kept_for(F.pad(leaf(torch.randn(SHAPE)), (0, 1)).tanh())) is Kept


def test_a_copy_is_laid_out_as_it_was_though_it_was_a_step_before():
    x = leaf(torch.randn(64, 32).t())
    with Deriving():
        y = x.clone()  # as x lies, not contiguous
        handle = kept_for(y.neg())
        first = handle.made()
        again = kept_for(y)
    with torch.no_grad():
        assert_same(again.made(), y.detach())
        assert torch.equal(handle.made(), first)


def test_casts_there_and_back():
    for wide in (FLOAT, DOUBLE):
        for narrow in (BF16, FP16):
            check(lambda x, n=narrow, w=wide: x.to(n).to(w), torch.randn(SHAPE).to(wide))
            check(lambda x, n=narrow, w=wide: x.to(w).to(n), torch.randn(SHAPE).to(narrow))


def test_a_wide_copy_of_what_is_not_at_hand_is_kept_in_16_bits():
    x, w = leaf(torch.randn(64, 32)), leaf(torch.randn(48, 32))
    for narrow in (BF16, FP16):
        with Deriving():
            product = F.linear(x.to(narrow), w.to(narrow))
            wide = product.float()
            handle = kept_for(wide)
            assert type(handle) is Derived
            assert [(type(each), each.data.dtype) for each in handle.sources] == [(Kept, narrow)]
        with torch.no_grad():
            assert_same(handle.made(), wide.detach())


def test_dropout():
    for dtype in (DOUBLE, FLOAT, BF16, FP16):
        for p in (0.0, 0.1, 0.37, 1.0):
            x = torch.randn(SHAPE).to(dtype)
            check(lambda x, p=p: torch.native_dropout(x, p, True)[0], x, name="NativeDropoutBackward0")
            if 0 < p < 1:
                check(lambda x, p=p: F.dropout(x.neg(), p), x)


def test_a_dropped_tensor_is_made_from_the_bits_of_its_mask():
    """Also where somebody else keeps them, and however the tensor lies."""
    for layout in LAYOUTS:
        x = layout(FLOAT)
        if not torch.empty_like(x).is_contiguous(memory_format=torch.channels_last):
            continue
        check(lambda x: torch.native_dropout(x.neg(), 0.3, True)[0], x)
        moved = []

        def away(tensor, moved=moved):
            moved.append(tensor.dtype)
            return tensor.numpy().copy()

        for hooks in (torch.autograd.graph.saved_tensors_hooks(away, torch.from_numpy), contextlib.nullcontext()):
            with hooks, Deriving():
                y = torch.native_dropout(leaf(x).neg(), 0.3, True)[0]
                handle = kept_for(y)
            assert [type(each) for each in handle.sources][1:] == [PackedMask]
            assert_same(handle.made(), y.detach())
        assert torch.uint8 in moved
        assert torch.bool not in moved


def test_masks_are_kept_in_bits():
    x, y = leaf(torch.randn(SHAPE)), leaf(torch.randn(SHAPE))
    for layout in (lambda mask: mask, lambda mask: mask.contiguous(memory_format=torch.channels_last)):
        mask = layout(torch.rand(SHAPE) > 0.5)
        with Deriving():
            node = torch.where(mask, x, y).grad_fn
        handle = kept_by(node, "condition")
        assert type(handle) is Bits
        assert_same(handle.made(), mask)


# --- the same on a GPU, with what it alone has a kernel for --------------------------------------------

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_a_gpu
@pytest.mark.parametrize("name", [*ONE, *SEVERAL, *MOVED])
def test_operators_on_a_gpu(name):
    if name == "UpsampleBilinear2DBackward0":
        pytest.skip("it is not derived there")
    for dtype in (FLOAT, BF16):
        for layout in LAYOUTS:
            if name in ONE:
                function, low, high = ONE[name]
                check(function, layout(dtype, low, high).cuda(), name=name)
            elif name in SEVERAL:
                check(SEVERAL[name], layout(dtype, 0, 1).cuda(), uniform(SHAPE, dtype, 0, 1).cuda(), name=name)
            else:
                check(lambda x: MOVED[name](x.neg()), layout(dtype).cuda(), name=name)


@on_a_gpu
def test_dropout_on_a_gpu_for_every_percentage():
    """The kernel's own scale differs from 1 / (1 - p), rounded, for 15 and 45 per cent, and for others."""
    for dtype in (DOUBLE, FLOAT, BF16, FP16):
        x = torch.randn(SHAPE).to(dtype).cuda()
        for percent in range(1, 100):
            check(lambda x, p=percent / 100: F.dropout(x.neg(), p), x, name="NativeDropoutBackward0")


@on_a_gpu
@pytest.mark.parametrize("name", [name for name in NORMS if "eval" not in name])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, FP16])
def test_norms_on_a_gpu(name, dtype):
    norm, shape = NORMS[name]
    # Of the norms of a GPU only batch norm takes wide weights beside narrow inputs.
    for weights in {dtype, FLOAT} if "batch" in name else {dtype}:
        w, b = torch.rand(shape).to(weights).cuda(), torch.randn(shape).to(weights).cuda()
        for layout in LAYOUTS:
            x = layout(dtype).cuda()
            for eps in (1e-5, 0.3):
                if name == "rms norm":
                    check(lambda x, w, eps=eps: norm(x, w, None, eps), x, w)
                else:
                    check(lambda x, w, b, eps=eps: norm(x, w, b, eps), x, w, b)


# --- all of them ----------------------------------------------------------------------------------------

ELSEWHERE = {
    "LogSoftmaxBackward0",
    "MaskedFillBackward1",
    "MeanBackward1",
    "NativeBatchNormBackward0",
    "NativeDropoutBackward0",
    "NativeGroupNormBackward0",
    "NativeLayerNormBackward0",
    "SafeSoftmaxBackward0",
    "SoftmaxBackward0",
    "SumBackward1",
    "TBackward0",
    "VarBackward0",
    "WeightNormInterfaceBackward0",
}  # in tests of their own


def test_every_entry_has_a_case():
    assert set(RULES) - GPU_ONLY == {*ONE, *SEVERAL, *MOVED, *COMPLEX, *ELSEWHERE}


def test_every_entry_is_the_name_of_a_node():
    names = set(dir(torch._C._functions))
    assert [name for name in RULES if name not in names and name not in GPU_ONLY] == []


def test_small_tensors_are_left():
    x = leaf(torch.randn(SMALLEST - 1))
    with Deriving():
        assert type(kept_for(x.exp())) is Kept


def test_under_autocast():
    """Casts to and fro, of activations and weights, and what the recipes do behind autocast's back."""
    norm, up, gate, down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def make(x, *parameters):
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(x)
            y = down(F.silu(gate(y)) * up(y))
            return torch.softmax(y.tanh(), -1) * x.exp()

    parameters = [p.detach() for module in (norm, up, gate, down) for p in module.parameters()]
    x = torch.randn(64, 32)

    def with_parameters(x, *own):
        rest = iter(own)
        for module in (norm, up, gate, down):
            for name, _ in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(next(rest)))
        return make(x)

    check(with_parameters, x, *parameters, frozen=range(1, 1 + len(parameters)))


@pytest.mark.parametrize("name", [*ONE, *SEVERAL, *MOVED, *NORMS])
def test_behind_a_graph_that_has_been_run_nothing_is_derived_and_nothing_raised(name):
    x, y = leaf(torch.rand(SHAPE)), leaf(torch.rand(SHAPE))
    w, b = (leaf(torch.rand(NORMS[name].weight_shape)) for _ in range(2)) if name in NORMS else (None, None)
    with Deriving():
        if name in ONE:
            output = ONE[name][0](x)
        elif name in SEVERAL:
            output = SEVERAL[name](x, y)
        elif name in MOVED:
            output = MOVED[name](x)
        else:
            output = NORMS[name].make(x, w, b, 1e-5)
        value = output.detach().clone()
        output.sum().backward()
        factor = leaf(torch.rand(()).to(output.dtype))
        loss = (output * factor).sum()
    ours = torch.autograd.grad(loss, factor)[0]
    assert torch.equal(ours, value.sum()) or ours.isnan()
