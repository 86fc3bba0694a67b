"""Every example runs as it stands, as somebody who just opened it would run it."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = {
    "bert_trainer.py": ["--steps", "2", "--batch-size", "2"],
    "open_clip_digits.py": ["--steps", "2"],
    "plain_loop_autocast.py": ["--steps", "10"],
    "vit_digits.py": ["--seeds", "2", "--epochs", "1"],
}
PROCESSES = {"fsdp2.py": ["--steps", "2", "--batch-size", "2"]}


def output_of(*command, timeout=300):
    # One thread: the machine that runs the tests often runs other things.
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_tried_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == SHORT.keys() | PROCESSES.keys()


@pytest.fixture
def output_here(monkeypatch, capsys, tmp_path):
    """What an example prints when it is run in this process, where its libraries are imported already."""

    def run(name):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *SHORT[name]])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", sorted(SHORT.keys() - {"vit_digits.py"}))
def test_an_example_runs_and_shows_what_it_saves(name, output_here):
    alone = name == "plain_loop_autocast.py"  # of them all one has a process of its own
    output = output_of(EXAMPLES / name, *SHORT[name]) if alone else output_here(name)
    saved = re.search(r"([\d.]+)% saved", output)
    assert saved, output
    assert float(saved[1]) > 5


def test_the_digits_example_finds_the_patched_accuracies_within_the_spread_between_seeds(output_here):
    output = output_here("vit_digits.py")
    assert "lie within the spread between seeds" in output


@pytest.mark.slow
def test_the_whole_training_run_on_digits_is_as_accurate_patched():
    output = output_of(EXAMPLES / "vit_digits.py", timeout=900)
    rows = dict(re.findall(r"^(stock|patched) (.*)$", output, flags=re.MULTILINE))
    stock, patched = ([float(value) for value in re.findall(r"[\d.]+", rows[kind])] for kind in ("stock", "patched"))
    assert min(stock[:3] + patched[:3]) > 0.9
    assert patched[-1] < 0.8 * stock[-1]  # MiB kept


@pytest.mark.slow
def test_the_digits_example_says_that_it_needs_two_seeds():
    script = EXAMPLES / "vit_digits.py"
    done = subprocess.run([sys.executable, script, "--seeds", "1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--seeds must be 2 or more" in done.stderr


@pytest.mark.distributed
@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_an_example_runs_in_two_processes(name):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = output_of(*torchrun, EXAMPLES / name, *PROCESSES[name])
    assert output.count("% saved") == 1  # by the first process alone
    assert re.search(r"step 2: loss \d", output)
