"""Later forward passes keep what the first one kept and the report said, whatever passes there were in between."""

import copy

import pytest
import torch
from conftest import kept_bytes
from torch import nn

import invact

WIDTH = 64


class Block(nn.Module):
    """A residual sum, which no recipe makes, and a product of two of which the second is kept last."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout, self.fails = nn.Dropout(0.1), False

    def forward(self, x):
        h = self.up(self.norm(x))
        y = h * torch.sigmoid(1.702 * h)
        if self.fails:
            raise RuntimeError("the user's")
        return x + self.dropout(self.down(y))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(3)), nn.Linear(WIDTH, 8))


def gradients(model, x):
    model.zero_grad()
    torch.manual_seed(1)
    model(x).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_every_pass_keeps_what_the_report_says_and_has_stocks_gradients(model):
    stock, x = copy.deepcopy(model), torch.randn(32, WIDTH, requires_grad=True)
    report = invact.patch(model, (x,), exact=True)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), gradients(stock, x), strict=True))
        assert kept_bytes(model, (x,)) == pytest.approx(report.bytes_after, rel=0.01)


def test_a_pass_that_ended_with_an_error_says_nothing_of_what_can_be_derived(model):
    x = torch.randn(32, WIDTH, requires_grad=True)
    report = invact.patch(model, (x,), exact=True)
    for block in model[:3]:
        block.fails = True
        with pytest.raises(RuntimeError, match="the user's"):
            model(x)
        block.fails = False
    assert kept_bytes(model, (x,)) == pytest.approx(report.bytes_after, rel=0.01)


@pytest.mark.parametrize("first", ["few", "evaluation", "channels last"])
def test_other_passes_before_it_change_nothing_of_what_a_pass_keeps(first):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1)),
        *(nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(16, 4, 3)),
    )
    few, x = torch.randn(2, 4, 12, 12), torch.randn(16, 4, 12, 12)
    report = invact.patch(model, (x,), exact=True)
    if first == "few":
        kept_bytes(model, (few,))
    elif first == "evaluation":
        kept_bytes(model.eval(), (x,))
    else:
        kept_bytes(model, (x.to(memory_format=torch.channels_last),))
    assert kept_bytes(model.train(), (x,)) == pytest.approx(report.bytes_after, rel=0.01)


class Routed(nn.Module):
    """The same operators in the same order, of other tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm, self.swapped = nn.LayerNorm(WIDTH), False

    def forward(self, x):
        one, other = self.norm(self.first(x)), self.second(x)
        if self.swapped:
            one, other = other, one
        return self.last(one.sigmoid() * one) + self.last(other.sigmoid() * other)


def test_two_ways_through_the_same_operators_each_have_stocks_gradients():
    torch.manual_seed(0)
    stock = Routed()
    model, x = copy.deepcopy(stock), torch.randn(32, WIDTH)
    invact.patch(model, (x,), exact=True)
    for swapped in (False, True, True, False, True):
        stock.swapped = model.swapped = swapped
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), gradients(stock, x), strict=True))
