"""`invact trial`: the same training in several ways, on real models and real data."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from saved_models import TINY_GPT2, saved_gpt2
from terminals import interrupted
from typer.testing import CliRunner, Result

from invact.bench import kept_bytes
from invact.cli import app
from invact.commands import output
from invact.simulation.setting import Setting
from invact.trial.comparing import train_in_ways
from invact.trial.result import Trial
from invact.trial.task import Batch, Task, make_task
from invact.trial.ways import COMPILED_WAYS, WAYS

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["trial", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def small() -> Trial:
    return train_in_ways(make_task(), steps=3, batch_size=4, seeds=[0, 1], memory_bytes=2**30)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return saved_gpt2(tmp_path)


def save_images(folder: Path, count: int) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(count):
        Image.effect_noise((20, 30), 40 + number).save(folder / f"{number}.png")


def test_ways_are_trained_side_by_side_and_the_baseline_comes_first(small: Trial):
    assert [run.name for run in small.runs] == list(WAYS)
    assert all(len(losses) == 3 for run in small.runs for losses in run.losses_by_seed)


def test_invact_keeps_at_most_nine_tenths_and_checkpointing_with_it_no_more_than_alone(small: Trial):
    kept = {run.name: run.activation_bytes for run in small.runs}
    assert kept["invact"] <= 0.9 * kept["baseline"]
    assert kept["invact+checkpointing"] <= min(kept["invact"], kept["checkpointing"])


def test_kept_bytes_are_those_of_an_independent_count(small: Trial, count_kept):
    task = make_task()
    assert small.runs[0].activation_bytes == count_kept(task.build(), task.batch(0, 0, 4).inputs)


def test_losses_lie_within_the_spread_between_seeds(small: Trial):
    assert small.spread is not None
    assert all(run.largest_difference < 1e-5 < small.spread for run in small.runs)


def test_batches_grow_from_way_to_way(small: Trial):
    batches = {run.name: run.largest_batch or 0 for run in small.runs}
    assert 0 < batches["baseline"] < batches["invact"] <= batches["invact+checkpointing"]
    assert batches["baseline"] < batches["checkpointing"] <= batches["invact+checkpointing"]


def test_a_seed_trains_the_same_again(small: Trial):
    again = train_in_ways(make_task(), steps=2, batch_size=4, seeds=[1], ways=["baseline", "invact"])
    assert again.runs[0].losses == pytest.approx(small.runs[0].losses_by_seed[1][:2], abs=1e-5)
    assert again.spread is None
    assert "several seeds" in again.verdict


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_trained_under_and_planned_for(dtype: torch.dtype):
    setting = Setting(torch.device("cpu"), dtype)
    result = train_in_ways(make_task(), steps=2, batch_size=2, ways=["baseline", "invact"], setting=setting)
    assert result.runs[1].activation_bytes < 0.9 * result.runs[0].activation_bytes
    assert str(dtype).removeprefix("torch.") in result.setting


def test_exact_is_that_of_patch_and_is_said():
    for exact in (False, True):
        result = train_in_ways(make_task(), steps=1, batch_size=2, ways=["baseline", "invact"], exact=exact)
        assert result.report.bytes_after == pytest.approx(result.run("invact").activation_bytes, rel=0.01)
        assert bool(result.report.inverted) != exact
        assert ("exact" in result.setting) == exact
        assert ("exact" in result.report.setting) == exact


def test_the_command_takes_exact(gpt2: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 30)
    options = ["--steps", 1, "--seeds", 1, "--exact", "--seq-len", 32, "--json"]
    result = run("--model", gpt2, "--data", tmp_path / "text.txt", *options)
    assert result.exit_code == 0, result.output
    stock, ours = json.loads(result.stdout)["runs"][:2]
    assert ours["losses"] == stock["losses"]


def test_json_is_the_only_thing_on_standard_output(gpt2: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 30)
    options = ["--steps", 1, "--seeds", 1, "--dtype", "bf16", "--seq-len", 32, "--json"]
    result = run("--model", gpt2, "--data", tmp_path / "text.txt", *options)
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout)["runs"]
    assert [run["name"] for run in runs] == list(WAYS)
    assert all(run["peak_bytes"] is None for run in runs)
    assert {"activation_bytes", "seconds_per_step", "losses"} <= runs[0].keys()
    assert "Traceback" not in result.stderr


def test_digits_train_a_vision_transformer():
    result = run("--model", "timm/test_vit", "--data", "digits", "--steps", 1, "--seeds", 1, "--batch-size", 2)
    assert result.exit_code == 0, result.output
    assert "digits, 160x160 pixels" in result.stdout
    assert "train several seeds" in " ".join(result.stdout.split())


def test_a_folder_of_images_has_its_folders_for_classes(tmp_path: Path):
    save_images(tmp_path / "cats", 2)
    save_images(tmp_path / "dogs", 3)
    batch = make_task("timm/test_vit", str(tmp_path)).batch(0, 0, 5)
    assert batch.inputs[0].shape == (5, 3, 160, 160)
    assert sorted(batch.targets.tolist()) == [0, 0, 1, 1, 1]


def test_contrastive_models_learn_images_and_the_names_of_their_classes():
    task = make_task("open_clip/ViT-B-32")
    batch = task.batch(0, 0, 2)
    features = torch.nn.functional.normalize(torch.eye(2, 8))
    assert [tensor.shape[0] for tensor in batch.inputs] == [2, 2]
    assert task.loss(lambda pixels, tokens: (features, features, torch.tensor(100.0)), batch) < 1e-6


def test_an_interrupted_trial_reports_the_steps_that_every_way_has_taken():
    taken: list[str] = []

    def interrupt(way: str) -> None:
        taken.append(way)
        if len(taken) == 5:
            raise KeyboardInterrupt

    ways = ["baseline", "invact"]
    result = train_in_ways(make_task(), steps=9, batch_size=2, seeds=[0, 1], ways=ways, on_step=interrupt)
    assert result.interrupted
    assert [len(run.losses) for run in result.runs] == [2, 2]
    assert "interrupted after 2 of 18 steps" in result.notes[-1]


def test_an_interruption_before_the_first_round_is_passed_on():
    def interrupt(way: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_in_ways(make_task(), steps=2, batch_size=2, ways=["baseline", "invact"], on_step=interrupt)


def test_a_model_without_a_switch_is_trained_without_checkpointing():
    layers = torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 2)
    task = Task(
        "a plain model",
        samples=4,
        build=lambda: torch.nn.Sequential(*layers),
        batch=lambda seed, step, size: Batch((torch.ones(size, 8),)),
        loss=lambda forward, batch: forward(*batch.inputs).square().mean(),
    )
    result = train_in_ways(task, steps=1, batch_size=4)
    assert [run.name for run in result.runs] == ["baseline", "invact"]
    assert "can not be checkpointed" in result.notes[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no/such/file.txt"], "There is no no/such/file.txt"),
        (["--data", ""], "There is no file without a name"),
        (["--data", "digits"], "reads text, and digits is images"),
        (["--data", "{empty}"], "is a folder. Pass a text file"),
        (["--model", "timm/test_vit", "--data", __file__], "reads images"),
        (["--model", "timm/test_vit", "--data", "{empty}"], "No image was found in the folder"),
        (["--model", "timm/test_vit", "--data", ""], "There is no file without a name"),
        (["--batch-size", 100_000], "A batch of 100000 is larger than the data"),
        (["--model", "{broken}"], "must be divisible"),
        (["--model", "whisper-tiny"], "reads audio"),
        (["--model", "electra-base-discriminator"], "not trainable"),
        (["--model", "bert-base-uncasd"], "bert-base-uncased"),
        (["--html", "no/such/folder/page.html"], "can not be written"),
        (["--gpu-memory", "much"], "no amount of memory"),
        (["--gpu-memory", "24"], "'24' has no unit"),
        (["gpt2", "--model", "gpt2"], "The model is named twice"),
        (["--steps", 0], "--steps"),
    ],
)
def test_bad_input_exits_2_with_one_sentence_and_no_traceback(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({**TINY_GPT2, "n_head": 3}))
    result = run(*(str(argument).format(empty=empty, broken=broken) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in " ".join(result.stderr.replace("│", "").split())
    assert "Traceback" not in result.stderr


def test_bad_input_leaves_no_empty_page_behind(tmp_path: Path):
    assert run("--data", "no/such/file.txt", "--html", tmp_path / "page.html").exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_stops_the_trial_with_a_sentence():
    task = make_task()
    broken = type(task)(task.title, task.samples, task.build, task.batch, lambda f, b: task.loss(f, b) * float("nan"))
    with pytest.raises(ValueError, match="loss of baseline is nan at step 0"):
        train_in_ways(broken, steps=1, batch_size=2)


def test_a_fault_of_ours_comes_with_its_traceback_and_not_as_a_model_that_can_not_be_trained(monkeypatch):
    class BrokenLedger(kept_bytes.Ledger):
        def memory(self):
            raise RuntimeError("a fault in the ledger")

    class RefusingLedger(kept_bytes.Ledger):
        def __enter__(self):
            raise RuntimeError("a fault in the ledger")

    for ledger in (BrokenLedger, RefusingLedger):
        monkeypatch.setattr(kept_bytes, "Ledger", ledger)
        with pytest.raises(RuntimeError, match=r"^a fault in the ledger$"):
            train_in_ways(make_task(), steps=1, batch_size=2)


def test_checkpointing_that_a_model_has_on_stays_on():
    models = []

    def build():
        model = make_task().build()
        model.gradient_checkpointing_enable()
        models.append(model)
        return model

    result = train_in_ways(replace(make_task(), build=build), steps=1, batch_size=2)
    assert all(model.is_gradient_checkpointing for model in models)
    kept = {run.name: run.activation_bytes for run in result.runs}
    assert kept["baseline"] == kept["checkpointing"]


def test_what_is_left_is_estimated_once_every_way_has_taken_two_steps():
    taken, estimates = [], []
    train_in_ways(
        make_task(),
        steps=3,
        batch_size=2,
        seeds=[0, 1],
        on_step=taken.append,
        on_estimate=lambda seconds, steps_left: estimates.append((len(taken), seconds, steps_left)),
    )
    (at, seconds, steps_left), *others = estimates
    assert not others
    assert (at, steps_left) == (2 * len(WAYS), 4 * len(WAYS))
    assert 0 < seconds < 600


def test_nothing_is_estimated_where_nothing_is_left():
    estimates: list[tuple[float, int]] = []
    ways = ["baseline", "invact"]
    train_in_ways(make_task(), steps=1, batch_size=2, ways=ways, on_estimate=lambda *left: estimates.append(left))
    assert not estimates


def test_without_a_terminal_the_estimate_and_lines_of_progress_go_to_standard_error_alone(monkeypatch):
    monkeypatch.setattr(output, "PROGRESS_EVERY", 0.02)
    result = run("--steps", 3, "--seeds", 1, "--batch-size", 2, "--json")
    assert json.loads(result.stdout)["runs"]
    first, *lines = result.stderr.splitlines()
    assert first.startswith("Training a small BERT")
    assert any(re.fullmatch(r"\d+ of 12 steps, .* so far, about .* left: .*", line) for line in lines)
    (estimate,) = [line for line in lines if line.startswith("About")]
    assert "--steps" in estimate
    assert "--batch-size" in estimate


def test_lines_of_progress_come_though_a_step_takes_long_and_end_with_the_block(monkeypatch, capsys):
    monkeypatch.setattr(output, "PROGRESS_EVERY", 0.02)
    with output.progress(2) as shown:
        deadline = time.monotonic() + 60
        said = ""
        while "0 of 2 steps" not in said and time.monotonic() < deadline:
            said += capsys.readouterr().err
        shown.advance("baseline")
        shown.advance("invact")
    assert "0 of 2 steps, 0 seconds so far: preparing" in said
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_control_c_prints_what_there_is_and_a_terminal_gets_a_progress_bar():
    ended = interrupted("trial", "--steps", "100000", "--json", after="20/1200000")
    assert ended.returncode == 130
    assert json.loads(ended.printed)["interrupted"] is True
    assert "━" in ended.seen


@pytest.mark.slow
def test_compiled_ways_keep_their_saving():
    ways = ["baseline", "invact", *COMPILED_WAYS]
    result = train_in_ways(make_task(), steps=2, batch_size=4, ways=ways)
    kept = {run.name: run.activation_bytes for run in result.runs}
    assert kept["invact+compile"] < kept["compile"] <= kept["baseline"]
    assert all(run.largest_difference < 1e-3 for run in result.runs)
