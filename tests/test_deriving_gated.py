"""A gated product and its activation are made again together where there is a kernel, and once each where there is
none."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from invact.deriving import gated
from invact.deriving.gated import GatedProduct
from invact.deriving.handles import Derived
from invact.deriving.hooks import Deriving
from invact.deriving.saved_by_node import kept_by
from invact.kernels.gated import ACTIVATIONS
from invact.pytorch.saved_tensor_hooks import shows_what_is_kept

SHAPE = (16, 128)
OPERATORS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu"}

pytestmark = pytest.mark.usefixtures("one_thread")


class Called(TorchDispatchMode):
    """The names of the operators that are run inside it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


def leaf(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().requires_grad_()


def stepped(act, swapped=False, frozen=False):
    """The gradients of a gated MLP, and what backward ran."""
    x, gate, up, down = leaf(0, *SHAPE), leaf(1, 128, 96), leaf(2, 128, 96), leaf(3, 96, 32)
    g, u = x @ gate, x @ up
    u = u.detach() if frozen else u
    a = act(g)
    loss = ((u * a if swapped else a * u) @ down).float().square().sum()
    with Called() as called:
        found = torch.autograd.grad(loss, [x, gate, down])
    return found, called.names


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_without_a_kernel_each_is_made_once_and_gradients_are_stocks(name, swapped, frozen):
    act = ACTIVATIONS[name]
    expected, _ = stepped(act, swapped, frozen)
    with Deriving():
        found, ran = stepped(act, swapped, frozen)
    assert all(map(torch.equal, found, expected))
    assert ran.count(OPERATORS[name]) == 1


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_with_a_kernel_both_come_of_one_pass(name, swapped, frozen, monkeypatch):
    passes = []

    def kernel(g, u, given):
        passes.append(given)
        a = torch.empty_like(g).copy_(ACTIVATIONS[given](g))
        return a, a * u

    act = ACTIVATIONS[name]
    expected, _ = stepped(act, swapped, frozen)
    monkeypatch.setattr(gated, "gated", kernel)
    with Deriving():
        found, ran = stepped(act, swapped, frozen)
    assert passes == [name]
    assert ran.count(OPERATORS[name]) == 1  # by what stands for the kernel here
    assert all(map(torch.equal, found, expected))


def test_who_asks_for_the_activation_alone_gets_it_before_and_after(monkeypatch):
    """One handle after the other, as backward may come to them in any order."""
    made = []

    def kernel(g, u, name):
        made.append(name)
        return F.silu(g), F.silu(g) * u

    monkeypatch.setattr(gated, "gated", kernel)
    g, u = leaf(0, *SHAPE), leaf(1, *SHAPE)
    with Deriving():
        a = F.silu(g.neg())
        h = a * u
        loss = h * h
    kept, product = kept_by(h.grad_fn, "self"), kept_by(loss.grad_fn, "self")
    assert (type(kept), type(product)) == (Derived, GatedProduct)
    with torch.no_grad():
        for handles in ((kept, product), (product, kept)):
            for handle, stock in zip(handles, (a, h) if handles[0] is kept else (h, a), strict=True):
                assert torch.equal(handle.made(), stock)
    assert made == ["silu", "silu"]  # outside of a backward pass nothing is shared


def test_only_products_by_one_of_these_activations_are_gated():
    g, u = leaf(0, *SHAPE), leaf(1, *SHAPE)
    products = {
        "another activation": lambda g, u: F.relu(g) * u,
        "a plain product": lambda g, u: g * u,
        "a square": lambda g, u: (lambda a: a * a)(F.silu(g)),
    }
    if shows_what_is_kept:
        products["a number"] = lambda g, u: F.silu(g) * 2.0
    with Deriving():
        for what, product in products.items():
            y = product(g.neg(), u)
            assert type(kept_by((y * y).grad_fn, "self")) is Derived, what
        for act in (F.silu, F.gelu, functools.partial(F.gelu, approximate="tanh")):
            y = act(g.neg()) * u
            assert type(kept_by((y * y).grad_fn, "self")) is GatedProduct
