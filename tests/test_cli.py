"""The command line, end to end: real models by name, no network."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner, Result

import invact
from invact.cli import app
from invact.commands.output import duration_in_words
from invact.commands.patch import LibraryName, Optimizer
from invact.fitting.optimizers import NAMES
from invact.patchers import libraries


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_does_not_wait_for_torch():
    code = "import sys, invact.cli; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_module_runs_as_the_command_does():
    output = subprocess.check_output([sys.executable, "-m", "invact", "--version"], text=True)
    assert output == f"invact {invact.__version__}\n"


def test_dry_run_prints_the_title_the_sites_and_what_is_saved():
    result = run("patch", "--model", "bert-base-uncased", "--batch-size", 2, "--seq-len", 128)
    assert result.exit_code == 0
    assert result.stdout.startswith("bert-base-uncased · BertForMaskedLM · 2 x 128 tokens · bf16\n")
    assert "GELUActivation" in result.stdout
    assert "% saved" in result.stdout


def test_dry_run_prints_what_is_made_again_and_the_floor_and_json_has_the_same(monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    arguments = ["patch", "bert-base-uncased", "--batch-size", 2, "--seq-len", 128]
    text = " ".join(run(*arguments).stdout.split())
    report = json.loads(run(*arguments, "--json").stdout)
    assert "LayerNorm's output" in text
    assert "made again from a sum" in text
    assert f"this plan is {report['bytes_after'] / report['bytes_floor'] - 1:.1%} above it" in text
    norms = [tensor for tensor in report["derived"] if tensor["what"] == "LayerNorm's output"]
    assert [norm["kept_by"] for norm in norms[:2]] == [
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.1.attention.self.query",
    ]
    assert all(tensor["bytes_saved"] > 0 < tensor["bytes_moved"] for tensor in report["derived"])
    assert sum(report["remains"].values()) == report["bytes_after"]


@pytest.mark.parametrize("name", ["gpt2", "open_clip/ViT-B-32", "timm/test_vit"])
def test_json_is_the_only_thing_on_standard_output(name):
    result = run("patch", "--model", name, "--batch-size", 2, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["bytes_after"] < report["bytes_before"]


def test_the_name_alone_is_as_good_as_after_the_option():
    named, after_option = (
        json.loads(run("patch", *name, "--batch-size", 2, "--json").stdout)
        for name in (["timm/test_vit"], ["--model", "timm/test_vit"])
    )
    assert named == after_option


@pytest.mark.parametrize("command", ["patch", "trial"])
def test_help_names_the_model_first(command):
    assert f"{command} [OPTIONS] [NAME]" in run(command, "--help").stdout


@pytest.mark.parametrize("width", [40, pytest.param(60, marks=pytest.mark.slow), 100])
def test_a_piped_report_is_as_wide_as_columns_says(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    result = run("patch", "timm/test_vit", "--gpu-memory", "24GiB")
    lines = result.stdout.splitlines()
    assert width // 2 < max(map(len, lines)) <= width
    assert "Largest batch in 24.00 GiB" in " ".join(result.stdout.split())


@pytest.mark.parametrize("given", ["", "0", "wide", "-3"])
def test_a_piped_report_is_120_wide_where_columns_says_nothing(given, monkeypatch):
    monkeypatch.setenv("COLUMNS", given)
    result = run("patch", "timm/test_vit", "--batch-size", 2)
    assert 100 < max(map(len, result.stdout.splitlines())) <= 120


def test_a_fault_of_ours_is_not_blamed_on_the_sizes(monkeypatch):
    from invact.planning import plans as planning

    def broken(*args, **kwargs):
        raise ValueError("a fault in the plan")

    monkeypatch.setattr(planning, "decide_in", broken)
    result = run("patch", "gpt2", "--seq-len", 16, "--batch-size", 1)
    assert isinstance(result.exception, ValueError)
    assert "--seq-len" not in result.stderr


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 seconds"),
        (1.2, "1 second"),
        (99, "99 seconds"),
        (120, "2 minutes"),
        (5400, "90 minutes"),
        (9000, "2.5 hours"),
    ],
)
def test_durations_are_told_in_the_unit_that_fits(seconds, words):
    assert duration_in_words(seconds) == words


def test_library_option_stands_for_the_prefix():
    result = run("patch", "--library", "timm", "--model", "test_vit", "--json")
    assert json.loads(result.stdout)["title"].startswith("test_vit · VisionTransformer")


def test_every_library_is_an_option():
    assert [library.value for library in LibraryName] == list(libraries)


def test_every_optimizer_that_can_be_counted_is_an_option():
    assert [optimizer.value for optimizer in Optimizer] == list(NAMES)


def test_autocast_keeps_the_parameters_in_fp32():
    result = run("patch", "--model", "timm/test_vit", "--autocast", "bf16", "--json")
    assert json.loads(result.stdout)["title"].endswith("fp32, autocast bf16")


def test_math_attention_keeps_more_than_fused_attention():
    fused, math = (
        json.loads(run("patch", "--model", "timm/test_vit", "--attention", kind, "--json").stdout)
        for kind in ("fused", "math")
    )
    assert math["bytes_before"] > fused["bytes_before"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "bert-base-uncasd"], "bert-base-uncased"),
        (["--model", "./no/such/directory"], "not a directory with a model configuration"),
        (["--model", "gpt2", "--seq-len", 5000], "at most 1024 tokens, not 5000"),
        (["--model", "gpt2", "--image-size", 224], "reads no images"),
        (["--model", "timm/test_vit", "--seq-len", 10], "no sequence length"),
        (["--model", "timm/vit_tiny_patch16_224", "--image-size", 8], "does not run with --image-size 8"),
        (["--model", "gpt2", "--batch-size", 0], "--batch-size"),
        (["--model", "gpt2", "--dtype", "fp8"], "--dtype"),
        (["--model", "gpt2", "--library", "jax"], "--library"),
        ([], "No model was named. Pass its name"),
        (["gpt2", "--model", "gpt2"], "The model is named twice"),
        (["gpt2", "bert-base-uncased"], "unexpected extra argument"),
        (["bert-base-uncasd"], "bert-base-uncased"),
    ],
)
def test_bad_input_exits_2_with_one_message_and_no_traceback(arguments, message):
    result = run("patch", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("Error") == 1
    assert "Traceback" not in result.stderr


def test_exact_inverts_nothing_and_is_said():
    result = CliRunner().invoke(app, ["patch", "--model", "bert-base-uncased", "--exact", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["sites"]
    assert {site["action"] for site in report["sites"]} == {"derive"}
    assert "exact" in report["setting"]


def test_a_command_run_from_python_leaves_logging_as_it_was():
    before = logging.root.manager.disable
    CliRunner().invoke(app, ["patch", "--model", "no such model"])
    assert logging.root.manager.disable == before
