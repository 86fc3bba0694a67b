"""What is derived is right however often and how far backward goes, and however often forward went before."""

import copy
import gc

import pytest
import torch
from deriving_twins import MASK, WIDTH, Block, Net, Normed, X, assert_alike, gradients, twins
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import invact
from invact.deriving import handles

pytestmark = pytest.mark.usefixtures("one_thread")


def test_backward_twice_and_for_some_alone():
    stock, ours = twins(Net(dropout=0.1), (X, MASK))

    def train(model):
        loss = model(X, MASK).square().mean()
        loss.backward(retain_graph=True)
        torch.autograd.grad(loss, [model.blocks[0].q.weight], retain_graph=True)
        torch.autograd.grad(loss, [model.blocks[1].gate.weight, model.norm.weight], retain_graph=True)
        loss.backward()

    assert_alike(stock, ours, train)


def test_a_gradient_penalty():
    stock, ours = twins(Net(), (X, MASK))

    def train(model):
        x = X.clone().requires_grad_()
        loss = model(x, MASK).square().mean()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + slope.square().sum()).backward()

    assert_alike(stock, ours, train)
    inverted = copy.deepcopy(stock)
    invact.patch(inverted, (X, MASK))
    expected = gradients(stock, train)
    for name, gradient in gradients(inverted, train).items():
        assert gradient is None or (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-8


class Breaking(torch.autograd.Function):
    broken = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if Breaking.broken:
            raise ArithmeticError
        return gradient


def test_a_backward_that_broke_off_leaves_nothing_to_the_next(monkeypatch):
    stock, ours = twins(Normed(lambda h: h + Breaking.apply(torch.sin(h)) * torch.cos(h)))

    def train(model):
        loss = model(X).square().mean()
        monkeypatch.setattr(Breaking, "broken", True)
        with pytest.raises(ArithmeticError):
            loss.backward(retain_graph=True)
        model.zero_grad(set_to_none=True)
        monkeypatch.setattr(Breaking, "broken", False)
        loss.backward()

    assert_alike(stock, ours, train)


def _norms_run(call):
    class Counter(TorchDispatchMode):
        norms = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.norms += func.overloadpacket is torch.ops.aten.native_layer_norm
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        call()
    return counter.norms


def test_what_q_k_and_v_want_is_made_once_and_let_go():
    _, ours = twins(Net())
    loss = ours(X).square().mean()
    assert _norms_run(lambda: loss.backward(retain_graph=True)) == 3  # two blocks and the last norm
    assert _norms_run(lambda: torch.autograd.grad(loss, [ours.blocks[1].q.weight], retain_graph=True)) == 2
    assert not [each for each in gc.get_objects() if type(each) is handles.Shared and each.tensor is not None]


def test_several_forwards_before_one_backward():
    stock, ours = twins(Net(dropout=0.1), (X, MASK))
    assert_alike(stock, ours, lambda m: (m(X, MASK) + m(2 * X, MASK) * m(X)).square().mean().backward())


def test_a_block_used_twice():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            block = Block()
            self.blocks = nn.Sequential(block, nn.Linear(WIDTH, WIDTH), block)

        def forward(self, x):
            return self.blocks(x)

    assert_alike(*twins(Shared()))
