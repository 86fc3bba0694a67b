"""`invact bench`: real activations and models in turns; how fast any of them is, is not for a test to say."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from terminals import interrupted
from typer.testing import CliRunner, Result

from invact.bench import kept_bytes
from invact.bench import steps as bench_steps
from invact.bench.contenders import PUBLISHED
from invact.bench.kernels import HOST_ELEMENTS, time_kernels
from invact.bench.random_models import with_weights
from invact.bench.records import COPY
from invact.bench.result import Bench
from invact.bench.running import run as bench
from invact.bench.steps import training_inputs
from invact.bench.tables import format_seconds
from invact.bench.timing import Race
from invact.cli import app
from invact.kernels import CURVES

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ELEMENTS = 4096
KERNELS = ("--only", "kernels", "--curve", "hardswish", "--elements", ELEMENTS, "--rounds", 2)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def steps() -> Bench:
    models, against = ["timm/test_vit"], ["checkpointing"]
    return bench("steps", models=models, against=against, batch_size=2, seq_len=64, rounds=2, device=CPU)


# --- timing ---------------------------------------------------------------------------------------------------------


def test_turns_are_taken_round_by_round_and_another_begins_each_time():
    order: list[str] = []
    turns = {name: lambda: 1.0 for name in "abc"}
    Race().run(turns, rounds=3, on_turn=order.append)
    assert "".join(order) == "abcbcacab"


def test_a_ratio_is_of_times_in_the_same_round():
    race = Race({"stock": [1.0, 10.0, 100.0], "invact": [2.0, 11.0, 300.0]})
    assert race.ratios("invact") == [2.0, 1.1, 3.0]
    assert race.ratio("invact") == 2.0
    assert race.quartiles("invact") == pytest.approx((1.55, 2.5))
    assert race.ratio("stock", "invact") == 0.5


def test_a_round_that_is_not_complete_does_not_count():
    race = Race({"stock": [1.0, 1.0, 9.0], "invact": [3.0, 3.0]})
    assert race.rounds == 2
    assert race.median("stock") == 1.0


@pytest.mark.parametrize(("seconds", "text"), [(12.3456, "12.35 s"), (0.0015, "1.50 ms"), (2.5e-6, "2.50 µs")])
def test_seconds_have_a_unit(seconds, text):
    assert format_seconds(seconds) == text


# --- kernels --------------------------------------------------------------------------------------------------------


def test_json_is_the_only_thing_on_standard_output_and_the_file_holds_the_same(tmp_path: Path):
    result = run(*KERNELS, "--against", "timm", "--json", "--output", tmp_path / "bench.json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "bench.json").read_text())
    assert {"torch", "transformers", "timm"} <= found["versions"].keys()
    assert found["machine"]["device"] in ("cpu", "cuda")
    assert found["date"].startswith("20")
    assert found["command"].startswith("invact")


def test_every_pass_has_ratios_to_stock_and_their_spread():
    found = json.loads(run(*KERNELS, "--against", "timm", "--json").stdout)
    passes = ["forward", "backward", "forward + backward", "forward, host", "backward, host"]
    assert [kernel["pass"] for kernel in found["kernels"]] == passes
    for kernel in found["kernels"]:
        stock, invact, timm = (entry for entry in kernel["contenders"] if entry["name"] != COPY)
        assert (stock["name"], invact["name"], timm["name"]) == ("stock", "invact", "timm")
        assert stock["ratio"] == 1
        pairs = zip(invact["seconds_by_round"], stock["seconds_by_round"], strict=True)
        assert invact["ratio"] == pytest.approx(statistics.median(own / base for own, base in pairs))
        low, high = invact["ratio_quartiles"]
        assert 0 < low <= invact["ratio"] <= high


def test_kept_bytes_are_one_tensor_and_for_invact_one_bit_more():
    result = bench("kernels", curves=["hardswish"], against=["timm"], elements=ELEMENTS, rounds=1, device=CPU)
    tensor = 4 * ELEMENTS
    forward = result.kernels[0]
    assert forward.kept_bytes == {"stock": tensor, "invact": tensor + ELEMENTS // 8, "timm": tensor}
    assert forward.kept_besides_output_bytes == {"stock": tensor, "invact": ELEMENTS // 8, "timm": tensor}


def test_the_share_of_a_copy_goes_by_the_bytes_that_must_be_moved():
    result = Bench.on(CPU, "")
    time_kernels(
        result,
        ["hardswish"],
        [torch.bfloat16],
        elements=ELEMENTS,
        rounds=2,
        against=["stock"],
        device=CPU,
        with_copy=True,
    )
    tensor, bits = 2 * ELEMENTS, ELEMENTS // 8
    forward, backward, both, *host = result.kernels
    assert forward.moved_bytes == {"stock": 2 * tensor, "invact": 2 * tensor + bits}  # x, y
    assert backward.moved_bytes == {"stock": 3 * tensor, "invact": 3 * tensor + bits}  # dy, what was kept, dx
    assert both.moved_bytes["invact"] == forward.moved_bytes["invact"] + backward.moved_bytes["invact"]
    assert forward.of_copy("invact") == pytest.approx(1 / forward.race.ratio("invact", COPY))
    assert [times.elements for times in host] == [HOST_ELEMENTS, HOST_ELEMENTS]
    assert all(COPY not in times.race.seconds for times in host)


def test_who_is_not_installed_is_left_out_and_named():
    missing = [published.name for published in PUBLISHED if not published.installed]
    if not missing:
        pytest.skip("every contender is installed here")
    result = run(*KERNELS, "--against", missing[0])
    assert f"Left out: {missing[0]}: not installed" in result.stdout
    assert "invact" in result.stdout


def test_who_is_installed_but_broken_is_left_out_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = next(published.name for published in PUBLISHED if not published.installed)
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('built for another CUDA')\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = bench("kernels", curves=["silu"], against=[name], elements=ELEMENTS, rounds=1, device=CPU)
    assert result.left_out == [f"{name} for silu: RuntimeError: built for another CUDA"]
    assert list(result.kernels[0].race.seconds) == ["stock", "invact"]


def test_contenders_compute_the_curve_that_they_are_timed_for():
    x = torch.linspace(-8, 8, 1001)
    compared = 0
    for published in PUBLISHED:
        if published.installed:
            for curve in published.functions:
                torch.testing.assert_close(published.activation(curve)(x), CURVES[curve].f(x), rtol=1e-5, atol=1e-5)
                compared += 1
    assert compared >= 3  # timm is installed for the tests


@pytest.mark.slow
def test_the_compiler_takes_part():
    result = bench("kernels", curves=["gelu_tanh"], against=["compile"], elements=ELEMENTS, rounds=2, device=CPU)
    assert list(result.kernels[0].race.seconds) == ["stock", "invact", "compile"]
    assert result.left_out == []


# --- whole steps ----------------------------------------------------------------------------------------------------


def test_a_step_is_timed_in_every_way(steps: Bench):
    (step,) = steps.steps
    assert list(step.race.seconds) == ["stock", "invact", "checkpointing"]
    assert step.race.rounds == 2
    assert step.kept_bytes["checkpointing"] < step.kept_bytes["invact"] < step.kept_bytes["stock"]


def test_bytes_saved_in_a_step_are_those_of_the_plan_and_of_an_independent_count(steps: Bench, count_kept):
    (step,) = steps.steps
    model = with_weights("timm/test_vit")
    assert step.planned_bytes_before == count_kept(model, training_inputs(model, 2, None, None, CPU))
    assert step.planned_bytes_saved > 0
    assert step.kept_bytes_saved == pytest.approx(step.planned_bytes_saved, rel=0.02)
    assert "+0.00%" in step.saved_in_words()


def test_sizes_go_to_the_models_that_take_them():
    image_model = with_weights("timm/test_vit")
    (images,) = training_inputs(image_model, 3, seq_len=7, image_size=None, device=CPU)
    assert images.shape == (3, 3, 160, 160)


def test_a_language_model_is_given_labels_and_the_length(tmp_path: Path):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 1, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    result = run("--only", "steps", "--model", tmp_path, "--batch-size", 2, "--seq-len", 9, "--rounds", 1)
    assert result.exit_code == 0, result.output
    assert "GPT2LMHeadModel, 2 x 9 tokens" in result.stdout


def test_a_model_without_a_switch_for_checkpointing_is_timed_without():
    models = ["timm/dla34"]
    result = bench("steps", models=models, batch_size=1, image_size=64, rounds=1, device=CPU)
    assert result.left_out == ["checkpointing of timm/dla34: the model has no switch for it"]
    assert list(result.steps[0].race.seconds) == ["stock", "invact"]


def test_a_fault_of_ours_comes_with_its_traceback_and_not_as_bad_sizes(monkeypatch: pytest.MonkeyPatch):
    class BrokenLedger(kept_bytes.Ledger):
        def memory(self):
            raise RuntimeError("a fault in the ledger")

    monkeypatch.setattr(kept_bytes, "Ledger", BrokenLedger)
    with pytest.raises(RuntimeError, match=r"^a fault in the ledger$"):
        bench("steps", models=["timm/test_vit"], batch_size=1, rounds=1, device=CPU)


def test_checkpointing_that_a_model_has_on_stays_on():
    model = with_weights("timm/test_vit")
    model.set_grad_checkpointing(True)
    ways = bench_steps._ways(Bench.on(CPU, ""), "timm/test_vit", model, ["checkpointing"])
    assert "checkpointing" in ways
    assert model.grad_checkpointing


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--curve", "relu7"], "There is no curve 'relu7' here. Choose from gelu,"),
        (["--against", "jax"], "There is no contender 'jax' here. Choose from stock, compile, checkpointing,"),
        (["--only", "steps", "--model", "bert-base-uncasd"], "bert-base-uncased"),
        (["--only", "steps", "--model", "timm/test_vit", "--image-size", 7], "--image-size"),
        (["--only", "everything"], "--only"),
        (["--elements", 0], "--elements"),
        (["--dtype", "fp8"], "--dtype"),
        (["--output", "no/such/folder/bench.json"], "can not be written"),
    ],
)
def test_bad_input_exits_2_with_one_sentence_and_no_traceback(arguments, message, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in " ".join(result.stderr.replace("│", "").split())
    assert "Traceback" not in result.stderr


def test_an_interrupted_run_gives_what_was_complete():
    taken: list[str] = []

    def interrupt(what: str) -> None:
        taken.append(what)
        if sum("warming up" not in each for each in taken) == 5:
            raise KeyboardInterrupt

    options = {"curves": ["hardswish"], "against": ["stock"], "elements": ELEMENTS, "device": CPU}
    result = bench("kernels", rounds=2, on_turn=interrupt, **options)
    assert result.interrupted
    assert [times.passed for times in result.kernels] == ["forward"]  # of backward one of two had had a turn


def test_an_interruption_before_the_first_round_is_passed_on():
    def interrupt(what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench("kernels", curves=["hardswish"], against=["stock"], elements=ELEMENTS, on_turn=interrupt, device=CPU)


@pytest.mark.slow
def test_control_c_prints_what_there_is_and_a_terminal_is_told_what_goes_on():
    options = ["--only", "kernels", "--curve", "hardswish", "--against", "stock", "--rounds", "1000000000", "--json"]
    ended = interrupted("bench", *options, after="forward: invact")
    assert ended.returncode == 130
    assert json.loads(ended.printed)["interrupted"] is True


@pytest.mark.gpu
def test_on_a_gpu_the_copy_the_peak_and_the_host_are_measured():
    result = bench(curves=["gelu"], models=["timm/test_vit"], against=["stock"], batch_size=64, rounds=5)
    forward, *_, host = result.kernels
    assert 0.1 < forward.of_copy("invact") < 1.5
    assert 0 < host.race.median("invact") < 1e-2
    assert forward.peak_bytes["invact"] > 0
    (step,) = result.steps
    # Of so small a model the highest point need not be where forward ends.
    assert step.kept_bytes_saved == pytest.approx(step.planned_bytes_saved, rel=0.01)
    assert step.peak_bytes["invact"] < step.peak_bytes["stock"]
