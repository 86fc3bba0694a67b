"""The ledger counts each kept storage once, and says who keeps it."""

import pytest
import torch
from torch import nn

import invact
from invact.ledger.ledger import Ledger


def mlp():
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


def test_every_kept_storage_is_counted_once_and_named():
    memory = invact.activation_memory(mlp(), (torch.randn(8, 64),))
    assert memory.by_module == {"0": 8 * 64 * 4, "1": 8 * 256 * 4, "2": 8 * 256 * 4}
    assert memory.by_class == {"Linear": 8 * 64 * 4 + 8 * 256 * 4, "GELU": 8 * 256 * 4}
    assert memory.total_bytes == sum(memory.by_module.values())
    assert memory.weight_cast_bytes == 0


def test_a_view_keeps_its_whole_storage_and_two_views_keep_it_once():
    class Halves(nn.Module):
        def forward(self, x):
            left, right = (x * 1.0).chunk(2, dim=-1)
            return left.exp() * right.sin()

    x = torch.randn(4, 32, requires_grad=True)
    # x * 1.0 is kept for sin, exp keeps its own result, and the product keeps exp's result and sin's.
    assert invact.activation_memory(Halves(), (x,)).total_bytes == (4 * 32 + 2 * 4 * 16) * 4


def test_what_the_graph_lets_go_is_not_counted():
    class Discards(nn.Module):
        def forward(self, x):
            (x * 2).exp().sum()
            return x * 3

    with Ledger(Discards()) as ledger:
        y = Discards()(torch.randn(8, requires_grad=True))
    assert ledger.memory().total_bytes == 0
    del y


def test_weights_cast_by_autocast_are_counted_apart():
    model = mlp()
    memory = invact.activation_memory(model, (torch.randn(8, 64, requires_grad=True),), autocast=torch.bfloat16)
    assert memory.weight_cast_bytes == 2 * (64 * 256 + 256 * 64)
    assert memory.total_bytes == 2 * (8 * 64 + 8 * 256 + 8 * 256)


def test_frozen_weights_cast_by_autocast_are_counted_apart_as_well():
    model = mlp().requires_grad_(False)
    memory = invact.activation_memory(model, (torch.randn(8, 64, requires_grad=True),), autocast=torch.bfloat16)
    assert memory.weight_cast_bytes == 2 * (64 * 256 + 256 * 64)


def test_the_count_agrees_with_an_independent_one_on_real_tensors(count_kept):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(inplace=True), nn.Conv2d(8, 8, 3), nn.Flatten()
    )
    x = torch.randn(2, 3, 16, 16)
    assert invact.activation_memory(model, (x,)).total_bytes == count_kept(model, (x,))


def test_the_models_own_error_comes_back_with_the_inputs_named():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        invact.activation_memory(mlp(), (torch.randn(8, 65),))
    if hasattr(caught.value, "add_note"):
        assert "float32[8, 65]" in caught.value.__notes__[0]
