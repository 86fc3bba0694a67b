"""`invact.fit`: real steps stay within the budget, with one block fewer they do not, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from fitted_models import MODELS, budget_for, gradients, least_and_most
from real_steps import counted_peak
from small_trained import gpt2, inputs_for, vit

import invact
from invact.fitting.blocks import repeated_blocks
from invact.fitting.choosing import fit_in
from invact.fitting.recomputing import blocks_of, foreseen_peak
from invact.planning.plans import decide

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]


BUDGETS = (0.0, 0.5, 0.95)
"""Shares of the way from all blocks checkpointed to none."""

# --- the budget ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["gpt2 with dropout", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "vit with dropout"))],
)
def test_real_steps_fit_the_budget_and_with_any_block_fewer_they_do_not(name):
    model = MODELS[name]()
    inputs = inputs_for(model, batch=16)
    decided = decide(model, inputs)
    least, none = least_and_most(decided, model, inputs)
    blocks, counts = blocks_of(none, repeated_blocks(model)), []
    for share in BUDGETS:
        budget = int(least.peak_bytes + share * (none.peak_bytes - least.peak_bytes))
        decided = decide(model, inputs)
        found = fit_in(decided, model, inputs, optimizer="sgd", memory=budget)
        chosen = list(decided.checkpointed)
        counts.append(len(chosen))
        with decided.applied(model):
            peak, _ = counted_peak(model, inputs, "sgd")
        assert peak == found.after.peak_bytes == decided.report.peak_bytes <= budget
        foreseen = foreseen_peak(none, [block for block in blocks if block.path in chosen])
        assert foreseen == pytest.approx(peak, rel=0.02)
        for path in chosen:
            decided.checkpointed[:] = [other for other in chosen if other != path]
            with decided.applied(model):
                assert counted_peak(model, inputs, "sgd")[0] > budget
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] > 0


def test_where_nothing_need_be_checkpointed_nothing_is():
    model = gpt2()
    report = invact.fit(model, inputs_for(model), memory="1GiB", optimizer="sgd")
    assert report.checkpointed == []
    assert report.inverted
    assert "nothing checkpointed; it fits as it is, too" in str(report)


def test_report_says_what_is_checkpointed_and_the_peak():
    model = vit(layers=4)
    inputs = inputs_for(model, 16)
    budget = budget_for(model, inputs)
    report = invact.fit(model, inputs, memory=budget, optimizer="sgd")
    assert report.checkpointed == ["blocks.0", "blocks.1"]
    assert report.peak_bytes <= report.memory_bytes == budget < report.peak_bytes_before
    assert sum(report.peak.values()) == report.peak_bytes
    assert all(block.bytes_won > 0 and 0 < block.share < 0.5 for block in report.blocks)
    kept = inputs[0].nbytes + counted_peak(model, inputs, "sgd")[1]
    assert report.bytes_after == pytest.approx(kept, abs=8)  # the sum that stands for a loss
    assert "2 blocks checkpointed" in str(report)
    assert report.to_dict()["checkpointed"] == report.checkpointed


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_the_optimizers_step_counts_against_the_budget(optimizer):
    model = gpt2(layers=3)
    inputs = inputs_for(model, 8)
    budget = budget_for(model, inputs, optimizer=optimizer)
    report = invact.fit(model, inputs, memory=budget, optimizer=optimizer)
    assert report.checkpointed
    assert counted_peak(model, inputs, optimizer)[0] == report.peak_bytes <= budget


def test_an_optimizer_of_the_users_is_asked_what_it_holds():
    model = gpt2(layers=3)
    inputs = inputs_for(model, 8)
    own = torch.optim.AdamW(model.parameters(), amsgrad=True)
    report = invact.fit(model, inputs, memory="1GiB", optimizer=own)
    assert report.optimizer == "AdamW"
    assert not own.state
    assert counted_peak(model, inputs, own)[0] == report.peak_bytes


def test_gradients_that_are_summed_over_batches_count_against_the_budget():
    model = gpt2(layers=3)
    inputs = inputs_for(model, 8)
    budget = budget_for(model, inputs, 0.4)
    alone = len(invact.fit(model, inputs, memory=budget, optimizer="sgd").blocks)
    invact.unpatch(model)
    report = invact.fit(model, inputs, memory=budget, optimizer="sgd", accumulating=True)
    assert len(report.blocks) >= alone
    assert counted_peak(model, inputs, "sgd", accumulating=True)[0] == report.peak_bytes <= budget


def test_under_autocast():
    model = vit(layers=3)
    inputs = inputs_for(model, 16)
    budget = budget_for(model, inputs, autocast=torch.bfloat16)
    report = invact.fit(model, inputs, memory=budget, optimizer="sgd", autocast=torch.bfloat16)
    assert counted_peak(model, inputs, "sgd", autocast=torch.bfloat16)[0] == report.peak_bytes <= budget


# --- gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2 with dropout", "llama", "vit with dropout"])
def test_gradients_are_stocks_bit_for_bit_with_exact(name):
    model = MODELS[name]()
    inputs = inputs_for(model, 16)
    stock = gradients(model, inputs)
    report = invact.fit(model, inputs, memory=budget_for(model, inputs, exact=True), optimizer="sgd", exact=True)
    assert 0 < len(report.blocks) < 4
    assert all(map(torch.equal, gradients(model, inputs), stock))


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_gradients_are_stocks_but_for_rounding(name):
    model = MODELS[name]()
    inputs = inputs_for(model, 16)
    stock = gradients(model, inputs)
    assert invact.fit(model, inputs, memory=budget_for(model, inputs), optimizer="sgd").blocks
    for ours, theirs in zip(gradients(model, inputs), stock, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6
