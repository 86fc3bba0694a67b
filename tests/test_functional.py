"""The public operators: stock's forward bit for bit, stock's layouts, and one tensor and the curve's bits kept."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from invact.kernels import CURVES, Curve
from invact.kernels.curves import monotone_families
from invact.kernels.curves.two_sided import TwoSided
from invact.kernels.own_thread import in_own_thread
from invact.kernels.pytorch import lookup_tables
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import invact.nn
from invact import functional
from invact.inverting import operators

ALL_CURVES = [
    *CURVES.values(),
    monotone_families.elu(0.7),
    monotone_families.celu(2.0),
    monotone_families.hardtanh(-0.3, 0.7),
    monotone_families.softplus(2.0, threshold=5.0),
]
EVERY_CURVE = pytest.mark.parametrize("curve", ALL_CURVES, ids=str)

Operator = Callable[[Tensor], Tensor]
PAIRS: dict[str, tuple[Operator, Operator]] = {
    "gelu": (functional.gelu, F.gelu),
    "gelu_tanh": (lambda x: functional.gelu(x, approximate="tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (functional.silu, F.silu),
    "mish": (functional.mish, F.mish),
    "hardswish": (functional.hardswish, F.hardswish),
    "elu": (lambda x: functional.elu(x, 0.7), lambda x: F.elu(x, 0.7)),
    "celu": (lambda x: functional.celu(x, 2.0), lambda x: F.celu(x, 2.0)),
    "selu": (functional.selu, F.selu),
    "leaky_relu": (lambda x: functional.leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, 0.2)),
    "hardtanh": (lambda x: functional.hardtanh(x, -0.3, 0.7), lambda x: F.hardtanh(x, -0.3, 0.7)),
    "relu6": (functional.relu6, F.relu6),
    "hardsigmoid": (functional.hardsigmoid, F.hardsigmoid),
    "softplus": (lambda x: functional.softplus(x, 2.0), lambda x: F.softplus(x, 2.0)),
    "softplus_jumping": (lambda x: functional.softplus(x, 2.0, 1.5), lambda x: F.softplus(x, 2.0, 1.5)),
    "logsigmoid": (functional.logsigmoid, F.logsigmoid),
    "softsign": (functional.softsign, F.softsign),
    "squared_relu": (functional.squared_relu, lambda x: F.relu(x).square()),
}
EVERY_PAIR = pytest.mark.parametrize(("ours", "stock"), PAIRS.values(), ids=PAIRS.keys())

VIEWS: dict[str, Operator] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "permuted": lambda x: x.permute(2, 0, 3, 1),
    "sliced": lambda x: x[:, ::2, :, 1:],
    "expanded": lambda x: x[:1].expand(6, -1, -1, -1),
    "one_row": lambda x: x[0, 0, 0],
    "scalar": lambda x: x[0, 0, 0, 0],
    "empty": lambda x: x[:0],
}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 5, 4, 7, generator=torch.Generator().manual_seed(0))


def kept(function: Operator, x: Tensor) -> list[Tensor]:
    """What autograd keeps for the backward of one call."""
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x)
    return tensors


@EVERY_PAIR
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_forward_is_stocks_bit_for_bit_and_gradients_lie_as_stocks_do(
    images: Tensor, ours: Operator, stock: Operator, dtype: torch.dtype, view: Operator
) -> None:
    x, x_stock = (view(images.to(dtype)).detach().requires_grad_() for _ in range(2))
    y, y_stock = ours(x), stock(x_stock)
    assert torch.equal(y, y_stock)
    assert y.stride() == y_stock.stride()

    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(dy)
    y_stock.backward(dy)
    assert x.grad is not None
    assert x_stock.grad is not None
    assert x.grad.stride() == x_stock.grad.stride()
    tolerance = 0.05 if dtype.itemsize == 2 else 1e-3
    torch.testing.assert_close(x.grad, x_stock.grad, atol=tolerance, rtol=tolerance)


@EVERY_CURVE
def test_exactly_y_and_the_bits_of_the_curve_are_kept(curve: Curve, images: Tensor) -> None:
    x = images.requires_grad_()
    y, side = kept(lambda x: functional.invert(x, curve), x)
    assert torch.equal(y, curve.f(x))
    assert side.dtype == torch.uint8
    assert side.numel() == (-(-x.numel() // 8) if curve.has_side else 0)
    assert side.untyped_storage().nbytes() == side.numel()


@EVERY_CURVE
def test_nothing_is_kept_where_no_gradient_is_asked_for(curve: Curve, images: Tensor) -> None:
    assert kept(lambda x: functional.invert(x, curve), images) == []
    with torch.no_grad():
        y = functional.invert(images.requires_grad_(), curve)
    assert torch.equal(y, curve.f(images))
    assert not y.requires_grad


@EVERY_CURVE
def test_first_and_second_derivatives_agree_with_finite_differences(curve: Curve) -> None:
    x = torch.tensor([-6.2, -4.1, -2.6, -1.9, -1.2, -0.4, 0.2, 0.9, 1.4, 2.7, 4.0, 9.0], dtype=torch.float64)
    x.requires_grad_()
    torch.autograd.gradcheck(lambda x: functional.invert(x, curve), x)
    torch.autograd.gradgradcheck(lambda x: functional.invert(x, curve), x, atol=1e-4)


@EVERY_CURVE
def test_a_third_derivative_says_that_it_is_not_supported(curve: Curve) -> None:
    x = torch.tensor([0.5], requires_grad=True)
    (first,) = torch.autograd.grad(functional.invert(x, curve), x, create_graph=True)
    (second,) = torch.autograd.grad(first, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(second, x)


@EVERY_CURVE
def test_second_derivatives_stay_finite_at_the_minimum_and_in_the_tails(curve: Curve) -> None:
    turn = curve.x_min if isinstance(curve, TwoSided) else 0.0
    x = torch.tensor([turn, -1e30, -200.0, -90.0, -0.0, 1e18], requires_grad=True)
    (first,) = torch.autograd.grad(functional.invert(x, curve).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.isfinite().all()


@EVERY_CURVE
def test_functional_transforms_give_the_right_gradients(curve: Curve) -> None:
    x = torch.linspace(-2.9, 2.85, 35, dtype=torch.float64).view(5, 7)
    expected = curve.derivative(x)

    def total(x: Tensor) -> Tensor:
        return functional.invert(x, curve).sum()

    by_rows = torch.func.vmap(torch.func.grad(total), in_dims=1, out_dims=1)(x)
    jacobian = torch.func.jacrev(lambda x: functional.invert(x, curve))(x)
    for gradient in (torch.func.grad(total)(x), by_rows, jacobian.view(35, 35).diagonal().view(5, 7)):
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6)


@EVERY_CURVE
def test_forward_mode_gives_the_right_derivatives(curve: Curve) -> None:
    x = torch.linspace(-2.9, 2.85, 7, dtype=torch.float64).requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        y = functional.invert(torch.autograd.forward_ad.make_dual(x, torch.full_like(x, 3.0)), curve)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, 3 * curve.derivative(x.detach()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "curve", [curve for curve in ALL_CURVES if curve.name != "hardsigmoid"], ids=str
)  # stock's own has no forward mode to compare with
def test_hessians_mix_forward_and_reverse_mode(curve: Curve) -> None:
    x = torch.linspace(-2.9, 2.85, 7, dtype=torch.float64)
    ours, stock = (
        torch.func.hessian(lambda x, f=f: f(x).square().sum())(x)
        for f in (lambda x: functional.invert(x, curve), curve.f)
    )
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)


@EVERY_CURVE
def test_vectorized_jacobians_are_those_of_a_loop(curve: Curve) -> None:
    x = torch.linspace(-2.9, 2.85, 7)
    jacobian = torch.autograd.functional.jacobian(lambda x: functional.invert(x, curve), x, vectorize=True)
    torch.testing.assert_close(jacobian.diagonal(), curve.derivative(x.double()).float(), atol=1e-5, rtol=1e-5)


# --- what is around the call ----------------------------------------------------------------------------


class Upsetting(TorchFunctionMode):
    """A mode of somebody's in which whatever PyTorch makes is made wrong."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made * 0 if isinstance(made, Tensor) else made


class UpsettingInside(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) * 0


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AMBIENT = {
    "device": lambda: torch.device("meta"),  # as torch.set_default_device, which PyTorch 2.8 can not take back whole
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
UPSETTING = {
    **AMBIENT,
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "function_mode": Upsetting,
    "dispatch_mode": UpsettingInside,
    "fake_tensors": FakeTensorMode,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("around", AMBIENT.values(), ids=AMBIENT.keys())
@EVERY_CURVE
def test_a_default_device_or_dtype_changes_nothing(
    curve: Curve, dtype: torch.dtype, around: Callable[[], contextlib.AbstractContextManager[Any]]
) -> None:
    def derivatives() -> tuple[Tensor, ...]:
        x = values.clone().requires_grad_()
        y = functional.invert(x, curve)
        (first,) = torch.autograd.grad(y, x, ones, create_graph=True)
        (second,) = torch.autograd.grad(first, x, ones)
        return y.detach(), first.detach(), second

    values = torch.linspace(-9, 9, 1001).to(dtype)
    ones = torch.ones_like(values)
    expected = derivatives()
    with around():
        found = derivatives()
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.dtype == wanted.dtype
        assert torch.equal(ours, wanted)


def made_tables() -> list[Tensor]:
    """One of each kind."""
    return [
        lookup_tables.slope_table(CURVES["gelu"], torch.bfloat16),
        lookup_tables.slope_table(CURVES["softsign"], torch.float16),
        *lookup_tables.fp32_tables(CURVES["gelu"]),
    ]


@pytest.fixture
def no_tables() -> Iterator[None]:
    """As before the first use, and no table that was made in the test is left to others."""
    caches = (lookup_tables.slope_table, lookup_tables.fp32_tables)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def check_tables(made: list[Tensor]) -> None:
    for cache in (lookup_tables.slope_table, lookup_tables.fp32_tables):
        cache.cache_clear()
    for table, expected in zip(made, made_tables(), strict=True):
        assert type(table) is Tensor
        assert table.device.type == "cpu"
        assert not table.is_inference()
        assert not table.requires_grad
        assert torch.equal(table.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("around", UPSETTING.values(), ids=UPSETTING.keys())
def test_tables_made_at_first_use_are_whole_whatever_mode_is_active(
    around: Callable[[], contextlib.AbstractContextManager[Any]], no_tables: None
) -> None:
    with around():
        made = made_tables()
    check_tables(made)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "functionalize", "jacobian"])
def test_tables_made_inside_a_transform_are_whole(transform: str, no_tables: None) -> None:
    made: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        made.extend(made_tables())
        return x * 2

    x = torch.tensor([1.0])
    if transform == "grad":
        torch.func.grad(lambda x: function(x).sum())(x)
    elif transform == "vmap":
        torch.func.vmap(function)(x)
    elif transform == "jvp":
        torch.func.jvp(function, (x,), (x,))
    elif transform == "functionalize":
        torch.func.functionalize(function)(x)
    else:
        torch.autograd.functional.jacobian(function, x, vectorize=True)
    check_tables(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_that_need_a_table_at_once_get_the_same_gradients(dtype: torch.dtype, no_tables: None) -> None:
    def gradient(_: int) -> Tensor:
        x = torch.linspace(-6, 6, 999).to(dtype).requires_grad_()
        return torch.autograd.grad(functional.gelu(x).sum(), x)[0]

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(gradient, range(8))
    assert all(torch.equal(first, other) for other in others)


def test_what_fails_in_making_a_table_is_raised_where_it_was_needed() -> None:
    def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_own_thread(work)


def test_curves_with_ever_new_parameters_are_not_kept_for_good() -> None:
    gone = weakref.ref(monotone_families.elu(0.999))
    for step in range(300):
        monotone_families.elu(1 + step / 1000)
    gc.collect()
    assert monotone_families.elu.cache_info().currsize <= 256
    assert gone() is None


# ------------------------------------------------------------------------------------------------------


def test_y_is_freed_with_its_last_reference(images: Tensor) -> None:
    y = functional.gelu(images.requires_grad_())
    gone = weakref.ref(y)
    gc.disable()  # a cycle would be collected, late
    try:
        del y
        assert gone() is None
    finally:
        gc.enable()


def test_y_may_come_back_from_storage_with_other_strides(images: Tensor) -> None:
    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = functional.gelu(x)
        y.backward(torch.ones_like(y))
        assert x.grad is not None
        return x.grad

    x = images.to(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
        stored = gradient(x)
    assert torch.equal(stored, gradient(x))


def test_changing_y_in_place_is_found_out(images: Tensor) -> None:
    y = functional.gelu(images.requires_grad_())
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_activation_checkpointing_recomputes_it(images: Tensor) -> None:
    from torch.utils.checkpoint import checkpoint

    x, x_plain = images.clone().requires_grad_(), images.clone().requires_grad_()
    checkpoint(functional.silu, x, use_reentrant=False).sum().backward()
    functional.silu(x_plain).sum().backward()
    torch.testing.assert_close(x.grad, x_plain.grad, atol=0, rtol=0)


@EVERY_CURVE
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_a_tensor_that_is_not_floating_is_refused(curve: Curve, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"floating type.*x\.float\(\)"):
        functional.invert(torch.zeros(3, dtype=dtype), curve)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_a_nested_tensor_is_given_to_the_stock_operator(layout: torch.layout) -> None:
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    x, x_stock = (torch.nested.nested_tensor(parts, layout=layout, requires_grad=True) for _ in range(2))
    for function, of in ((functional.gelu, x), (F.gelu, x_stock)):
        torch.cat([part.flatten() for part in function(of).unbind()]).square().sum().backward()
    assert x.grad is not None
    assert x_stock.grad is not None
    for ours, stock in zip(x.grad.unbind(), x_stock.grad.unbind(), strict=True):
        assert torch.equal(ours, stock)


@pytest.mark.parametrize("module", [invact.nn.GELU(), invact.nn.ELU(0.7), invact.nn.Softplus(threshold=0.5)], ids=str)
def test_a_trace_holds_the_stock_operator_and_trains(module: torch.nn.Module) -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), module), torch.randn(4, 8)
    traced = torch.jit.trace(model, x)
    assert torch.equal(traced(x), model(x))
    (ours,), (own,) = (torch.autograd.grad(f(x).sum(), [model[0].weight]) for f in (traced, model))
    torch.testing.assert_close(ours, own, atol=1e-4, rtol=1e-4)


def test_an_unknown_approximation_is_refused() -> None:
    with pytest.raises(ValueError, match='"none" or approximate="tanh"'):
        functional.gelu(torch.zeros(3), approximate="fast")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: functional.elu(x, -0.5), "alpha=-0.5: it then turns.*Pass a positive alpha"),
        (lambda x: functional.leaky_relu(x, -0.1), "Pass a positive negative_slope"),
        (lambda x: functional.celu(x, 0.0), "Pass a positive alpha"),
        (lambda x: functional.softplus(x, 0.0), "Pass a positive beta"),
        (lambda x: functional.hardtanh(x, 1.0, 1.0), "Pass a max_val larger than min_val"),
    ],
)
def test_parameters_with_which_y_does_not_tell_the_gradient_are_refused(
    call: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3))


@pytest.mark.parametrize(
    ("curve", "dtype"),
    [
        (CURVES["gelu"], torch.float32),
        (CURVES["gelu_tanh"], torch.bfloat16),
        (CURVES["hardswish"], torch.float32),
        (monotone_families.elu(0.7), torch.float32),
        (monotone_families.softplus(2.0, 5.0), torch.float32),
    ],
    ids=str,
)
def test_torch_compile_gives_the_same_and_keeps_the_same(curve: Curve, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    x, x_eager = (torch.linspace(-5, 5, 35).view(5, 7).to(dtype).requires_grad_() for _ in range(2))
    compiled = torch.compile(lambda x: functional.invert(x, curve), fullgraph=True)
    assert sum(t.nbytes for t in kept(compiled, x)) <= x.nbytes + 8

    y, y_eager = compiled(x), functional.invert(x_eager, curve)
    y.backward(torch.ones_like(y))
    y_eager.backward(torch.ones_like(y))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(y, y_eager, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(x.grad, x_eager.grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "module",
    [invact.nn.GELU(), invact.nn.Hardswish(), invact.nn.SiLU(), invact.nn.ELU(0.7), invact.nn.Hardtanh()],
    ids=str,
)
def test_modules_compile_whole_with_every_number_dynamic(module: torch.nn.Module) -> None:
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.Linear(7, 7), module)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    x, x_eager = (torch.linspace(-5, 5, 35).view(5, 7).requires_grad_() for _ in range(2))
    compiled(x).square().sum().backward()
    model(x_eager).square().sum().backward()
    torch.testing.assert_close(x.grad, x_eager.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("module", "stock"),
    [
        (invact.nn.GELU(), torch.nn.GELU()),
        (invact.nn.GELU(approximate="tanh"), torch.nn.GELU(approximate="tanh")),
        (invact.nn.SiLU(inplace=True), torch.nn.SiLU()),
        (invact.nn.Mish(inplace=True), torch.nn.Mish()),
        (invact.nn.Hardswish(inplace=True), torch.nn.Hardswish()),
        (invact.nn.ELU(0.7, inplace=True), torch.nn.ELU(0.7)),
        (invact.nn.CELU(2.0), torch.nn.CELU(2.0)),
        (invact.nn.SELU(inplace=True), torch.nn.SELU()),
        (invact.nn.LeakyReLU(0.2, inplace=True), torch.nn.LeakyReLU(0.2)),
        (invact.nn.Hardtanh(-0.3, 0.7), torch.nn.Hardtanh(-0.3, 0.7)),
        (invact.nn.ReLU6(inplace=True), torch.nn.ReLU6()),
        (invact.nn.Hardsigmoid(), torch.nn.Hardsigmoid()),
        (invact.nn.Softplus(2, 5), torch.nn.Softplus(2, 5)),
        (invact.nn.LogSigmoid(), torch.nn.LogSigmoid()),
        (invact.nn.Softsign(), torch.nn.Softsign()),
    ],
    ids=str,
)
def test_modules_are_drop_in_and_work_in_place_where_asked(
    module: torch.nn.Module, stock: torch.nn.Module, images: Tensor
) -> None:
    expected = stock(images)
    assert isinstance(module, type(stock))
    x = images.clone().requires_grad_() * 1.0
    y = module(x)
    assert torch.equal(y, expected)
    in_place = getattr(module, "inplace", False)
    assert (y is x) == in_place
    x = images.clone()
    assert torch.equal(module(x), expected)
    assert torch.equal(x, expected if in_place else images)


@pytest.mark.parametrize(
    "function",
    [functional.silu, functional.mish, functional.hardswish, functional.elu, functional.leaky_relu, functional.relu6],
)
def test_in_place_the_gradient_is_the_one_out_of_place(function: Callable[..., Tensor], images: Tensor) -> None:
    gradients = []
    for inplace in (False, True):
        x = images.clone().requires_grad_()
        function(x * 1.0, inplace=inplace).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_forward_mode_in_place_says_that_it_is_not_supported() -> None:
    x = torch.randn(8, requires_grad=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="in place is not supported"):
            functional.silu(dual * 1.0, inplace=True)


def test_in_place_on_a_view_changes_what_it_is_a_view_of() -> None:
    gradients = []
    for function in (F.silu, functional.silu):
        x = torch.linspace(-3, 3, 32).requires_grad_()
        whole = (x * 1.0).view(4, 8)
        part = whole[:, :3]
        assert function(part, inplace=True) is part
        assert torch.equal(part, F.silu(x.view(4, 8)[:, :3]))
        whole.square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_examples_in_the_docstrings_run() -> None:
    import doctest

    for module in (functional, operators, invact.nn):
        assert doctest.testmod(module).failed == 0
