"""InvActCallback in a real Lightning Trainer: the same run, less memory, and the stock module afterwards."""

import csv
import os
import runpy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning")

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from small_lightning import Classifier, data, inverted, trained

from invact.lightning import InvActCallback


def test_the_module_is_patched_from_the_first_step_and_put_back_at_the_end(tmp_path):
    callback = InvActCallback()
    module, _ = trained(tmp_path, [callback])
    assert module.inverted_in_step == [2] * 6
    assert not inverted(module)
    assert [site.path for site in callback.report.inverted] == ["first.2", "second.1"]
    assert 0 < callback.report.saving < 1


def test_neither_the_order_of_the_data_nor_the_random_numbers_change(tmp_path):
    stock, _ = trained(tmp_path)
    stock_state = torch.get_rng_state()
    callback = InvActCallback(exclude="*")  # plans, and changes nothing
    watched, _ = trained(tmp_path, [callback])
    assert (callback.report.inverted, callback.report.derived) == ([], [])
    assert watched.losses == stock.losses  # bitwise, with dropout
    assert torch.equal(torch.get_rng_state(), stock_state)


def test_the_losses_are_those_of_the_stock_module(tmp_path):
    stock, _ = trained(tmp_path)
    patched, _ = trained(tmp_path, [InvActCallback()])
    assert patched.losses == pytest.approx(stock.losses, abs=1e-5)


def test_a_step_that_calls_its_networks_without_the_modules_forward_is_planned_too(tmp_path):
    class Direct(Classifier):
        forward = None

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.second(self.first(batch[0])), batch[1])

    callback = InvActCallback()
    trained(tmp_path, [callback], module=Direct())
    assert len(callback.report.inverted) == 2


def test_a_step_that_reads_values_is_planned_too_and_leaves_no_trace(tmp_path):
    class Reading(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.read = [*getattr(self, "read", []), loss.item()]
            return loss

    callback = InvActCallback()
    module, _ = trained(tmp_path, [callback], module=Reading())
    assert len(callback.report.inverted) == 2
    assert module.read == module.losses


def test_batches_without_a_tensor_are_planned_too(tmp_path):
    class Reader(Classifier):
        def training_step(self, batch, batch_idx):
            x = torch.tensor([[float(len(text))] * 16 for text in batch])
            return F.cross_entropy(self(x), torch.zeros(len(batch), dtype=torch.long))

    module, callback = Reader(), InvActCallback(include="first.*")
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(["a", "bb", "ccc", "dddd"], batch_size=4))
    assert [site.path for site in callback.report.inverted] == ["first.2"]
    assert not inverted(module)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_patterns_of_a_wrong_kind_are_refused_when_it_is_made(option):
    with pytest.raises(TypeError, match=f"{option} is 5.*Pass a string"):
        InvActCallback(**{option: 5})


def test_include_and_exclude_are_those_of_patch(tmp_path):
    for options in ({"include": "first.*"}, {"exclude": ["second.*"]}):
        callback = InvActCallback(**options)
        trained(tmp_path, [callback], max_steps=1)
        assert [site.path for site in callback.report.inverted] == ["first.2"]


def test_exact_is_that_of_patch(tmp_path):
    callback = InvActCallback(exact=True)
    trained(tmp_path, [callback], max_steps=1)
    assert "exact" in callback.report.setting
    assert callback.report.inverted == []
    with pytest.raises(TypeError, match=r"exact is 4.*Pass True or False"):
        InvActCallback(exact=4)


def test_few_bits_are_those_of_patch(tmp_path):
    callback = InvActCallback(few_bits=2)
    trained(tmp_path, [callback], max_steps=1)
    assert "few_bits=2, approximate" in callback.report.setting
    with pytest.raises(ValueError, match=r"few_bits is 9.*1 to 4"):
        InvActCallback(few_bits=9)
    with pytest.raises(ValueError, match="Leave one of them out"):
        InvActCallback(few_bits=2, exact=True)


def test_the_plan_is_made_under_the_precision_of_the_trainer(tmp_path):
    callback = InvActCallback()
    trained(tmp_path, [callback], max_steps=1, precision="bf16-mixed")
    assert "bfloat16" in callback.report.setting


def test_the_figures_reach_the_logger_once_and_the_trial_of_the_step_logs_nothing(tmp_path):
    callback = InvActCallback()
    logger = CSVLogger(tmp_path)
    trained(tmp_path, [callback], logger=logger, log_every_n_steps=1)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    (figures,) = [row for row in rows if row["invact/saving"]]
    assert float(figures["invact/saving"]) == pytest.approx(callback.report.saving)
    assert float(figures["invact/sites"]) == 2
    assert len([row for row in rows if row["loss"]]) == 6


class StopRunError(Exception):
    pass


def test_a_failed_run_puts_the_module_back_before_the_caller_sees_the_error(tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, *args):
            raise StopRunError

    module = Classifier()
    with pytest.raises(StopRunError):
        trained(tmp_path, [InvActCallback(), Fails()], module=module)
    assert module.inverted_in_step == [2]
    assert not inverted(module)


def test_resuming_from_a_checkpoint_gives_the_losses_of_an_uninterrupted_run(tmp_path):
    _, trainer = trained(tmp_path, [InvActCallback()], max_steps=6)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, _ = trained(tmp_path, [InvActCallback()], checkpoint=tmp_path / "last.ckpt", max_steps=12)
    _, trainer = trained(tmp_path, max_steps=6)
    trainer.save_checkpoint(tmp_path / "stock.ckpt")
    stock_resumed, _ = trained(tmp_path, checkpoint=tmp_path / "stock.ckpt", max_steps=12)
    assert resumed.inverted_in_step == [2] * 6
    assert resumed.losses == pytest.approx(stock_resumed.losses, abs=1e-5)


def test_the_sanity_check_before_training_runs_the_stock_module(tmp_path):
    module, _ = trained(tmp_path, [InvActCallback()], limit_val_batches=1, num_sanity_val_steps=1)
    assert module.inverted_in_validation[0] == 0
    assert not inverted(module)


def test_validation_alone_changes_nothing(tmp_path):
    callback = InvActCallback()
    module = Classifier()
    Trainer(accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False).validate(module, data())
    assert callback.report is None


def test_a_module_that_steps_its_optimizers_itself_is_left_as_it_is_with_a_warning(tmp_path):
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    callback = InvActCallback()
    module = Manual()
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with pytest.warns(UserWarning, match=r"invact\.patch on its networks"):
        trainer.fit(module, data())
    assert module.inverted_in_step == [0, 0]
    assert trainer.global_step == 2


def test_without_lightning_the_error_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'invact\[lightning\]'"):
        runpy.run_module("invact.lightning")


TWO_PROCESSES = """
import sys
import torch
sys.path.insert(0, {tests!r})
from small_lightning import inverted, trained
from invact.lightning import InvActCallback

module, trainer = trained(sys.argv[1], [InvActCallback()], devices=2, strategy="ddp", max_steps=3)
weights = torch.cat([p.detach().flatten() for p in module.parameters()])
print("RESULT", trainer.global_rank, trainer.world_size, *module.inverted_in_step, len(inverted(module)),
      float(weights.double().sum()))
"""


@pytest.mark.distributed
def test_two_processes_train_one_patched_module(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES.format(tests=os.path.dirname(__file__)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = sorted(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert [result[:-1] for result in results] == [[str(rank), "2", "2", "2", "2", "0"] for rank in range(2)]
    assert results[0][-1] == results[1][-1]
