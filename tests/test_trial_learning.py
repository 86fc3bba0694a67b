"""GPT-2 learns with inverted activations as it learns without, and visibly worse with one bit of derivative."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from saved_models import TINY_GPT2, saved_gpt2

from invact.inverting.autograd_functions import invert
from invact.kernels import CURVES
from invact.trial.task import make_task

pytestmark = pytest.mark.usefixtures("one_thread")


class OneBitDerivative(torch.autograd.Function):
    """GELU whose derivative is one of two levels: its mean on either side of zero, weighted by a normal x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x > 0)
        return torch.nn.functional.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx, grad):
        (right,) = ctx.saved_tensors
        return grad * torch.where(right, ONE_BIT_LEVELS[1], ONE_BIT_LEVELS[0])


def _levels() -> tuple[float, float]:
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.nn.functional.gelu(x, approximate="tanh").sum(), x)
    weight = torch.exp(-x.detach().square() / 2)
    return tuple(float((slope * weight)[side].sum() / weight[side].sum()) for side in (x <= 0, x > 0))


ONE_BIT_LEVELS = _levels()


class Coarse(torch.nn.Module):
    def forward(self, x):
        return OneBitDerivative.apply(x)


class Exact(torch.nn.Module):
    def forward(self, x):
        return invert(x, CURVES["gelu_tanh"])


def final_loss(task, activation, seed: int, steps: int) -> float:
    """The mean of the last fifty steps: single batches differ by more than the ways do."""
    torch.manual_seed(seed)
    model = task.build()
    for block in model.transformer.h:
        if activation is not None:
            block.mlp.act = activation()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, task.batch(seed, step, 16))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


@pytest.mark.slow
def test_500_steps_of_gpt2_end_where_the_baseline_ends_and_with_one_bit_of_derivative_visibly_worse(tmp_path: Path):
    """Measured 2026-11-23, CPU, torch 2.14.1, seeds 0, 1, 2:

    baseline 1.8942 1.8952 1.8781, invact the same to 1e-6, one bit 1.9438 1.9468 1.9320

    Weights start with a standard deviation of 1/sqrt(width), so that what the activation is given has one of 1. With
    GPT-2's own 0.02 so narrow a model starts with 0.16: there the slope of GELU is nearly 1/2 everywhere, and two
    levels far apart, though wrong, train faster. They then end 0.12 to 0.17 below the baseline.
    """
    task = make_task(str(saved_gpt2(tmp_path, initializer_range=TINY_GPT2["n_embd"] ** -0.5)))
    ends = {
        name: [final_loss(task, activation, seed, 500) for seed in range(3)]
        for name, activation in {"baseline": None, "invact": Exact, "one bit": Coarse}.items()
    }
    print(ends)
    spread = max(ends["baseline"]) - min(ends["baseline"])
    worse = {
        name: [other - stock for stock, other in zip(ends["baseline"], ends[name], strict=True)]
        for name in ("invact", "one bit")
    }
    assert max(map(abs, worse["invact"])) < 0.1 * spread
    assert min(worse["one bit"]) > 2 * spread
