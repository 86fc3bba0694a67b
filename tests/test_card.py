"""The command for a card, `python benchmarks/card`, on this CPU: every part runs, whatever fails is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CARD = Path(__file__).parents[1] / "benchmarks" / "card"


def run(folder, *arguments):
    """What the command prints last, and its files by part."""
    done = subprocess.run(
        [sys.executable, str(CARD), "--output", str(folder), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout, {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return run(tmp_path_factory.mktemp("card"), "--tiny")


@pytest.mark.slow
def test_every_part_runs_without_an_error_and_writes_its_file(tiny):
    printed, parts = tiny
    assert parts.keys() == {"card", "tests", "kernels", "steps", "host", "profile", "planner"}
    errors = {part: [key for key in found if key.startswith("error")] for part, found in parts.items()}
    assert not any(errors.values()), printed
    assert "no table" not in printed
    assert len(printed) < 12_000
    assert all(f"== {part}" in printed for part in parts)


@pytest.mark.slow
def test_the_tests_for_a_card_pass_as_far_as_a_cpu_can_run_them(tiny):
    found = tiny[1]["tests"]["tests"]
    assert not found["failures"]
    assert found["passed"] > 30


@pytest.mark.slow
def test_every_way_of_every_model_is_timed_and_gets_stocks_gradients(tiny):
    steps = tiny[1]["steps"]
    eager = ["bert", "gpt2", "mistral", "vit", "clip", "convnext", "lora"]
    assert list(steps) == [*eager, "bert-compiled", "mistral-compiled"]
    for name, found in steps.items():
        assert found["inverted"] > 0, name
        others = ["invact", "checkpointing", "selective"] if name in eager else ["compile", "compile+invact"]
        assert list(found["ways"]) == ["stock", *others]
        for way, measured in found["ways"].items():
            assert measured["ratio"] > 0, (name, way)
            off = measured["gradients_off"]
            assert off is None or off["whole"] < 1e-4, (name, way)


@pytest.mark.slow
def test_the_planned_batch_is_beside_one_that_was_tried(tiny):
    for found in tiny[1]["planner"].values():
        for way in ("baseline", "invact", "checkpointing"):
            assert found[way]["true"] > 0
            assert {True, False} == {attempt["fits"] for attempt in found[way]["tries"]}


def test_a_part_that_is_out_of_time_is_told_and_the_others_run(tmp_path):
    printed, parts = run(tmp_path, "--tiny", "--only", "host", "--items", "gelu", "--seconds", "0")
    assert "stopped after" in parts["host"]["error gelu"]
    assert "stopped after" in printed


def test_one_part_alone_runs_by_its_name(tmp_path):
    printed, parts = run(tmp_path, "--tiny", "--only", "host", "--items", "gelu")
    assert parts.keys() == {"card", "host"}
    assert "== host" in printed
