"""A module whose forward is put together by the test, patched and stock."""

import copy

import torch
from torch import nn

import invact

WIDTH = 64
X = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))


class Odd(nn.Module):
    """Two linear layers with a norm, a batch norm and a parameter at hand, put together by `put_together`."""

    def __init__(self, put_together):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.batch_norm, self.act = nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU()
        self.image_norm = nn.InstanceNorm1d(WIDTH, affine=True, track_running_stats=True)
        self.scale = nn.Parameter(torch.randn(WIDTH) * 2)
        self.register_buffer("mask", torch.ones(WIDTH, WIDTH, dtype=torch.bool).triu(1))
        self.put_together = put_together

    def forward(self, x):
        return self.put_together(self, x)


def step(model):
    model(X).square().sum().backward()


def gradients(model, train):
    train(model)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_alike(put_together, train=step):
    stock = Odd(put_together)
    ours = copy.deepcopy(stock)
    invact.patch(ours, (X,), exact=True)
    expected, found = gradients(stock, train), gradients(ours, train)
    assert expected.keys() == found.keys()
    assert [name for name, gradient in expected.items() if not torch.equal(gradient, found[name])] == []
