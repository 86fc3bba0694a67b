"""Models with four blocks, budgets between all of them checkpointed and none, and gradients of a step."""

from __future__ import annotations

import torch
from real_steps import loss_of
from small_trained import gpt2, llama, vit

from invact.fitting.blocks import repeated_blocks
from invact.fitting.simulated_training import simulated_training
from invact.planning.plans import decide


def least_and_most(decided, model, inputs, optimizer="sgd"):
    """The peak of a step with all blocks checkpointed, and with none."""
    steps = []
    with simulated_training(model, inputs, decided.setting, optimizer) as take_step:
        for paths in (repeated_blocks(model), []):
            decided.checkpointed[:] = paths
            with decided.applied(model):
                steps.append(take_step(with_work=True))
    return steps


def budget_for(model, inputs, share=0.5, optimizer="sgd", **options):
    least, most = least_and_most(decide(model, inputs, **options), model, inputs, optimizer)
    return int(least.peak_bytes + share * (most.peak_bytes - least.peak_bytes))


MODELS = {
    "gpt2": lambda: gpt2(dropout=0, layers=4),
    "gpt2 with dropout": lambda: gpt2(layers=4),
    "llama": lambda: llama(layers=4),
    "vit": lambda: vit(layers=4, dropout=0),
    "vit with dropout": lambda: vit(layers=4),
}


def gradients(model, inputs):
    model.zero_grad()
    torch.manual_seed(3)
    loss = loss_of(model, inputs)
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in model.parameters())]
