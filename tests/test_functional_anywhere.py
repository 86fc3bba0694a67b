"""The public operators in whatever is around the call: modes, transforms, threads, defaults of device and dtype."""

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
from curves_and_pairs import EVERY_CURVE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import invact.nn
from invact import functional
from invact.kernels import CURVES, Curve
from invact.kernels.curves import monotone_families
from invact.kernels.own_thread import in_own_thread
from invact.kernels.pytorch import lookup_tables


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
