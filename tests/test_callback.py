"""InvActCallback in a real transformers.Trainer: the same run, less memory, and the stock model afterwards."""

import contextlib
import os
import runpy
import subprocess
import sys

import pytest
import torch

import invact

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from small_trainer import LAYERS, Watch, classifier, inverted, losses, sentences, trained, trainer  # noqa: E402
from transformers import BertForSequenceClassification, Trainer, TrainerCallback  # noqa: E402

from invact.callback import InvActCallback  # noqa: E402


def test_the_model_is_patched_from_the_first_step_and_put_back_at_the_end(tmp_path):
    callback, watch = InvActCallback(), Watch()
    run = trained(tmp_path, [callback, watch], max_steps=1)
    assert watch.while_training == LAYERS
    assert not inverted(run.model)
    assert len(callback.report.inverted) == LAYERS
    assert invact.unpatch(run.model) == 0


def test_the_plan_is_made_of_the_first_batch_of_the_run(tmp_path):
    callback = InvActCallback()
    trained(tmp_path, [callback], max_steps=1)
    batch = {"input_ids": torch.zeros(4, 8, dtype=torch.long), "labels": torch.zeros(4, dtype=torch.long)}
    expected = invact.plan(classifier().train(), batch)
    assert callback.report.bytes_before == pytest.approx(expected.bytes_before, rel=0.01)
    assert callback.report.bytes_after == pytest.approx(expected.bytes_after, rel=0.01)


def test_neither_the_order_of_the_data_nor_the_random_numbers_change(tmp_path):
    class Recorded(list):
        def __init__(self, items):
            super().__init__(items)
            self.order = []

        def __getitem__(self, index):
            self.order.append(index)
            return super().__getitem__(index)

    stock_data, data = Recorded(sentences()), Recorded(sentences())
    stock = trained(tmp_path, dataset=stock_data)
    stock_state = torch.get_rng_state()
    watched = trained(tmp_path, [InvActCallback(exclude="*")], dataset=data)  # plans, inverts nothing
    assert losses(watched) == losses(stock)  # bitwise, with dropout
    assert data.order == stock_data.order
    assert torch.equal(torch.get_rng_state(), stock_state)


def test_the_losses_are_those_of_the_stock_model(tmp_path):
    stock, patched = trained(tmp_path), trained(tmp_path, [InvActCallback()])
    assert losses(patched) == pytest.approx(losses(stock), abs=1e-5)


@pytest.mark.parametrize("options", [{"include": "*layer.0*"}, {"exclude": ["*layer.1*"]}])
def test_include_and_exclude_are_those_of_patch(tmp_path, options):
    callback = InvActCallback(**options)
    trained(tmp_path, [callback], max_steps=1)
    assert ["layer.0" in site.path for site in callback.report.inverted] == [True]


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
    full, mixed = InvActCallback(), InvActCallback()
    trained(tmp_path, [full], max_steps=1)
    trained(tmp_path, [mixed], max_steps=1, bf16=True)
    assert "bfloat16" in mixed.report.setting
    assert "bfloat16" not in full.report.setting
    assert mixed.report.bytes_before < 0.8 * full.report.bytes_before


def test_the_figures_reach_the_logs_once_and_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    callback = InvActCallback()
    run = trained(tmp_path, [callback], max_steps=3, report_to="tensorboard")
    with_figures = [entry for entry in run.state.log_history if "invact/saving" in entry]
    assert [entry["step"] for entry in with_figures] == [1]
    assert with_figures[0]["invact/saving"] == callback.report.saving
    assert with_figures[0]["invact/sites"] == LAYERS
    assert with_figures[0]["invact/bytes_saved"] == callback.report.bytes_before - callback.report.bytes_after
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    (event,) = board.Scalars("train/invact/saving")
    assert event.value == pytest.approx(callback.report.saving)


def test_the_figures_reach_the_logs_when_only_the_summary_is_logged(tmp_path):
    run = trained(tmp_path, [InvActCallback()], max_steps=2, logging_steps=100)
    (entry,) = [entry for entry in run.state.log_history if "invact/saving" in entry]
    assert "train_loss" in entry


def test_the_plan_is_logged_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    trained(tmp_path, [InvActCallback()], max_steps=3, log_level="info")
    plans = {id(record) for record in caplog.records if "kept for backward" in record.getMessage()}
    assert len(plans) == 1


class StopRunError(Exception):
    pass


class FailsInTheStep(Trainer):
    def training_step(self, *args, **kwargs):
        super().training_step(*args, **kwargs)
        raise StopRunError


class FailsInTheData(list):
    def __getitem__(self, index):
        raise StopRunError


class Fails(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize(
    "options",
    [
        {"kind": FailsInTheStep},
        {"dataset": FailsInTheData(sentences())},
        {"callbacks": [Fails(StopRunError())]},
        {"callbacks": [Fails(KeyboardInterrupt())]},
    ],
    ids=["step", "data", "callback", "Ctrl-C"],
)
def test_a_failed_run_puts_the_model_back_before_the_caller_sees_the_error(tmp_path, options):
    others = options.get("callbacks", [])
    run = trainer(tmp_path, **{**options, "callbacks": [InvActCallback(), *others]})
    try:
        run.train()
    except (StopRunError, KeyboardInterrupt):
        assert not inverted(run.model)
        assert not run.model._forward_pre_hooks
    else:
        pytest.fail("the run was to fail")


def test_importing_it_changes_nothing_in_transformers():
    code = (
        "from transformers import Trainer; train = Trainer.train; import invact.callback as c; "
        "assert Trainer.train is train; callback = c.InvActCallback(); assert Trainer.train is not train; "
        "other = c.InvActCallback(); del callback; assert Trainer.train is not train; "
        "del other; assert Trainer.train is train; again = c.InvActCallback(); assert Trainer.train is not train"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", [Trainer, FailsInTheStep], ids=["ends", "fails"])
def test_the_order_of_the_callbacks_and_the_trainers_log_are_the_users(tmp_path, kind):
    run = trainer(tmp_path, [Watch(), InvActCallback()], kind=kind)
    order = list(run.callback_handler.callbacks)
    with contextlib.suppress(StopRunError):
        run.train()
    assert run.callback_handler.callbacks == order
    assert "log" not in vars(run)


def test_a_log_that_the_user_put_on_the_trainer_is_called_and_stays(tmp_path):
    seen = []
    run = trainer(tmp_path, [InvActCallback()], max_steps=1)
    run.log = own = lambda logs, *args: seen.append(dict(logs))
    run.train()
    assert "invact/saving" in seen[0]
    assert run.log is own


def test_what_another_library_puts_over_train_stays(tmp_path, monkeypatch):
    callback, calls = InvActCallback(), []
    below = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda *args, **kwargs: calls.append(1) or below(*args, **kwargs))
    over = Trainer.train
    trained(tmp_path, [callback], max_steps=1)
    del callback
    assert Trainer.train is over
    assert calls == [1]


def test_a_callback_added_to_a_finished_trainer_puts_the_model_back_after_failure_too(tmp_path):
    run = trainer(tmp_path, kind=FailsInTheStep)
    run.add_callback(InvActCallback)
    with pytest.raises(StopRunError) as failure:
        run.train()
    assert failure
    assert not inverted(run.model)


def test_a_model_that_can_not_be_planned_fails_with_its_own_error_and_stays_as_it_was(tmp_path):
    run = trainer(tmp_path, [InvActCallback()], dataset=[{"input_ids": torch.tensor([99] * 8), "labels": 0}] * 8)
    with pytest.raises(IndexError):
        run.train()
    assert not run.model._forward_pre_hooks


def test_resuming_from_a_checkpoint_gives_the_losses_of_an_uninterrupted_run(tmp_path):
    whole = trained(tmp_path / "whole", [InvActCallback()])
    trained(tmp_path / "part", [InvActCallback()], save_strategy="steps", save_steps=3)
    callback, watch = InvActCallback(), Watch()
    resumed = trainer(tmp_path / "part", [callback, watch], save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    assert watch.while_training == LAYERS
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-5)
    assert not inverted(resumed.model)


def test_a_checkpoint_is_that_of_the_stock_model(tmp_path):
    trained(tmp_path, [InvActCallback()], save_strategy="steps", save_steps=3, max_steps=3)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3")
    assert loaded.state_dict().keys() == classifier().state_dict().keys()


def test_evaluation_alone_changes_nothing(tmp_path):
    callback = InvActCallback()
    run = trainer(tmp_path, [callback])
    run.evaluate()
    assert callback.report is None
    assert not inverted(run.model)
    assert not run.model._forward_pre_hooks


def test_evaluation_before_and_during_training_gives_the_stock_figures(tmp_path):
    options = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    stock, patched = trained(tmp_path, **options), trained(tmp_path, [InvActCallback()], **options)
    figures = [[e["eval_loss"] for e in run.state.log_history if "eval_loss" in e] for run in (stock, patched)]
    assert figures[1][0] == figures[0][0]
    assert figures[1] == pytest.approx(figures[0], abs=1e-5)
    assert not any("invact/saving" in e for e in patched.state.log_history if "eval_loss" in e)


def test_a_second_run_of_the_same_trainer_is_patched_again(tmp_path):
    callback, watch = InvActCallback(), Watch()
    run = trained(tmp_path, [callback, watch], max_steps=1)
    watch.while_training = 0
    run.train()
    assert watch.while_training == LAYERS
    assert not inverted(run.model)


def test_what_was_patched_before_training_stays_so_after_it(tmp_path):
    model = classifier()
    invact.patch(model, {"input_ids": torch.zeros(4, 8, dtype=torch.long)}, include="*layer.0*")
    trained(tmp_path, [InvActCallback()], model=model, max_steps=1)
    assert len(inverted(model)) == 1


def test_gradient_checkpointing_and_accumulation_go_with_it(tmp_path):
    options = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "max_steps": 3}
    stock, patched = trained(tmp_path, **options), trained(tmp_path, [InvActCallback()], **options)
    assert losses(patched) == pytest.approx(losses(stock), abs=1e-5)


@pytest.mark.slow
def test_a_compiled_model_is_patched_too(tmp_path):
    watch = Watch()
    run = trained(tmp_path, [InvActCallback(), watch], torch_compile=True, max_steps=2)
    assert watch.while_training == LAYERS
    assert not inverted(run.model)


@pytest.mark.slow
def test_a_smaller_batch_tried_after_running_out_of_memory_is_planned_anew(tmp_path):
    class OutOfMemoryAtFirst(Trainer):
        failed = False

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory. (said by the test)")
            return loss

    callback = InvActCallback()
    run = trained(tmp_path, [callback], kind=OutOfMemoryAtFirst, auto_find_batch_size=True, max_steps=2)
    assert len(callback.report.inverted) == LAYERS
    assert not inverted(run.model)


def test_a_run_that_never_calls_the_models_forward_says_that_nothing_was_patched(tmp_path, caplog, monkeypatch):
    class HeadOnly(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            return model.classifier(torch.ones(4, 32)).sum()

    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    trained(tmp_path, [InvActCallback()], kind=HeadOnly, max_steps=1)
    assert "invact patched nothing" in caplog.text


def test_it_is_found_in_the_package_itself():
    assert invact.InvActCallback is InvActCallback


def test_without_transformers_the_error_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'invact\[transformers\]'"):
        runpy.run_module("invact.callback")


TWO_PROCESSES = """
import os
import sys
import torch
sys.path.insert(0, {tests!r})
from small_trainer import Watch, inverted, trainer
from invact import InvActCallback

watch, callback = Watch(), InvActCallback()
run = trainer(sys.argv[1], [callback, watch])
run.train()
rank = int(os.environ["RANK"])
weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
print("RESULT", rank, torch.distributed.get_backend(), torch.distributed.get_world_size(), watch.while_training,
      len(inverted(run.model)), float(weights.double().sum()))
torch.distributed.destroy_process_group()  # else its threads end with an abort
"""


@pytest.mark.distributed
def test_two_processes_under_accelerate_launch_train_one_patched_model(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES.format(tests=os.path.dirname(__file__)))
    # accelerate starts processes without MPI only by --multi_gpu; the Trainer's use_cpu then makes them use gloo.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = sorted(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert [result[:5] for result in results] == [[str(r), "gloo", "2", str(LAYERS), "0"] for r in range(2)]
    assert results[0][5] == results[1][5]
