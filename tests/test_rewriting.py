"""Methods compiled anew with expressions in them run by others: once for all that stands in the same places."""

import gc
import types

import torch
from torch import nn

import invact
from invact.recognition import rewriting


class Sloped(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.slope = nn.Linear(16, 64), nn.Linear(64, 16), 1.0

    def forward(self, x):
        x = self.up(x)
        return self.down(x * torch.sigmoid(self.slope * x))


def test_a_slope_that_changes_between_plans_leaves_no_more_codes():
    model, x = Sloped(), torch.randn(4, 16)
    for slope in (1.0, 1.702, 1.0):
        model.slope = slope
        assert len(invact.patch(model, (x,)).inverted) == 1
        model(x).sum().backward()
        invact.unpatch(model)
    codes = rewriting._REWRITTEN[Sloped.forward]
    assert all(isinstance(code, types.CodeType) for code in codes.values())
    assert len(codes) == 1


def test_what_was_compiled_goes_with_the_function():
    def kind():
        class Mine(Sloped):
            def forward(self, x):
                x = self.up(x)
                return self.down(x * torch.sigmoid(x))

        return Mine

    model, x = kind()(), torch.randn(4, 16)
    assert len(invact.patch(model, (x,)).inverted) == 1
    before = len(rewriting._REWRITTEN)
    del model
    gc.collect()
    gc.collect()  # the class of ours first, and then what it is of
    assert len(rewriting._REWRITTEN) == before - 1
