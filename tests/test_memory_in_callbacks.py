"""A memory budget on the callbacks: blocks are checkpointed for the length of a run, and the log says so once."""

from __future__ import annotations

import logging

import pytest
import torch
from small_models import small_model
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

import invact
from invact.lightning import InvActCallback as LightningCallback

lightning = pytest.importorskip("lightning.pytorch")

IDS = torch.arange(8 * 64).view(8, 64) % 97
BATCH = {"input_ids": IDS, "labels": IDS}


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return small_model("GPT2LMHeadModel", n_layer=4, n_head=2, vocab_size=97, use_cache=False).train()


@pytest.fixture(scope="module")
def budget() -> int:
    """Less than patching alone comes to, and enough with some blocks checkpointed."""
    model = small_gpt2()
    patched = invact.fit(model, BATCH, memory="1TiB")
    return int(0.9 * patched.peak_bytes)


class Blocks(invact.InvActCallback):
    """Notes, in the middle of the run, which blocks are checkpointed."""

    def on_step_end(self, args, state, control, **kwargs):
        self.during = [layer.gradient_checkpointing for layer in kwargs["model"].transformer.h]


def trained(tmp_path, model, callback, **options):
    args = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=8, report_to=[], use_cpu=True, log_level="info", **options
    )
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(2, 1)]
    Trainer(model, args, train_dataset=data, callbacks=[callback]).train()


def test_a_trainers_run_fits_the_budget_and_leaves_the_blocks_as_they_were(tmp_path, budget):
    model, callback = small_gpt2(), Blocks(memory=budget)
    trained(tmp_path, model, callback)
    report = callback.report
    assert 0 < len(report.checkpointed) < 4
    assert callback.during == [f"transformer.h.{n}" in report.checkpointed for n in range(4)]
    assert report.peak_bytes <= budget
    assert not any(layer.gradient_checkpointing for layer in model.transformer.h)
    assert all("_gradient_checkpointing_func" not in vars(module) for module in model.modules())


def test_one_line_says_what_was_done_and_the_predicted_peak(tmp_path, budget, caplog, monkeypatch):
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    with caplog.at_level(logging.INFO):
        trained(tmp_path, small_gpt2(), invact.InvActCallback(memory=str(budget) + "B"))
    lines = {record.getMessage() for record in caplog.records if record.getMessage().startswith("invact: ")}
    (line,) = lines
    assert "checkpointed" in line
    assert "predicted peak of a step" in line
    assert "\n" not in line


def test_gradients_that_are_summed_over_batches_are_counted_while_they_wait(tmp_path):
    once, twice = invact.InvActCallback(), invact.InvActCallback()
    trained(tmp_path, small_gpt2(), once)
    trained(tmp_path, small_gpt2(), twice, gradient_accumulation_steps=2)
    gradients = sum(p.numel() * 4 for p in small_gpt2().parameters())
    assert twice.report.peak_bytes > once.report.peak_bytes
    assert twice.report.peak_bytes <= once.report.peak_bytes + gradients


def test_a_budget_that_can_not_be_met_ends_the_run_before_its_first_step(tmp_path):
    model = small_gpt2()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(invact.DoesNotFitError, match="were given"):
        trained(tmp_path, model, invact.InvActCallback(memory="2MiB"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert invact.unpatch(model) == 0


def test_a_budget_without_a_unit_is_refused_when_the_callback_is_made():
    with pytest.raises(ValueError, match="has no unit"):
        invact.InvActCallback(memory="24")


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = small_gpt2()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def test_a_run_of_lightning_fits_the_budget(tmp_path, budget):
    module, callback = Module(), LightningCallback(memory=budget)
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
        enable_progress_bar=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(IDS.repeat(2, 1), batch_size=8))
    assert 0 < len(callback.report.checkpointed) < 4
    assert callback.report.checkpointed[0] == "model.transformer.h.0"
    assert not any(layer.gradient_checkpointing for layer in module.model.transformer.h)
