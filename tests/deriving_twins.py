"""Small models that derive much, as twins: one stock, one patched, to train alike bit for bit."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import (
    checkpoint,
)

import invact

WIDTH = 64
X = torch.randn(2, 32, WIDTH, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 32, 32, dtype=torch.bool).triu(1)


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None, context=None):
        h = self.norm1(x)
        other = h if context is None else context
        q, k, v = self.q(h), self.k(other), self.v(other)
        scores = q @ k.transpose(-1, -2) / 8
        if mask is not None:
            scores = scores.masked_fill(mask, -1e4)
        x = x + self.dropout(self.o(scores.softmax(-1) @ v))
        h = self.norm2(x)
        return x + self.dropout(self.down(F.silu(self.gate(h)) * self.up(h)))


def plain(block, *args):
    return block(*args)


class Net(nn.Module):
    """Blocks between two linear layers, each run by `run`."""

    def __init__(self, dropout=0.0, run=None):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.run = run or plain

    def forward(self, x, mask=None):
        x = self.first(x)
        for block in self.blocks:
            x = self.run(block, x, mask)
        return self.last(self.norm(x))


class Normed(nn.Module):
    """A norm between linear layers, with something done to what it gives."""

    def __init__(self, between=lambda h: h):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.between = between

    def forward(self, x):
        self.x = self.first(x)
        self.h = self.norm(self.x)
        return self.last(self.between(self.h))


def twins(stock, inputs=(X,)):
    """A model and its patched copy."""
    ours = copy.deepcopy(stock)
    report = invact.patch(ours, inputs, exact=True)
    assert report.derived
    return stock, ours


def step(model):
    model(X).square().mean().backward()


def masked_step(model):
    model(X, MASK).square().mean().backward()


def gradients(model, train):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    train(model)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_alike(stock, ours, train=step):
    expected, found = gradients(stock, train), gradients(ours, train)
    assert any(gradient is not None for gradient in expected.values())
    for name, gradient in expected.items():
        same = found[name] is None if gradient is None else torch.equal(gradient, found[name])
        assert same, name
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def assert_left_alone(stock, why):
    """Asserts that nothing is derived of a model, that the report says why, and that it trains as before."""
    ours = copy.deepcopy(stock)
    report = invact.patch(ours, (X,), exact=True)
    assert not report.derived
    assert why in report.notes[-1]
    assert_alike(stock, ours)


def run_checkpointed(reentrant, **options):
    return lambda block, *args: checkpoint(block, *args, use_reentrant=reentrant, **options)
