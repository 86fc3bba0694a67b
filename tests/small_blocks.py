"""A block around an activation, and the same block with a patched copy."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import invact


def around(act):
    """A block around an activation, with the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), act, nn.Linear(32, 16))


class Written(nn.Module):
    """The same with the activation written out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def pair(stock, x):
    """A model and a copy of it that is patched, where something must be inverted."""
    ours = copy.deepcopy(stock)
    assert invact.patch(ours, (x,)).inverted
    return stock, ours
