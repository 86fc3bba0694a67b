"""The command `python benchmarks/deriving.py`, as small as it runs: every part, and figures that can be believed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # it times three models in five ways

COMMAND = Path(__file__).parents[1] / "benchmarks" / "deriving.py"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """What is printed, and the file."""
    file = tmp_path_factory.mktemp("deriving") / "tiny.json"
    done = subprocess.run(
        [sys.executable, str(COMMAND), "--device", "cpu", "--output", str(file), "--tiny"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads(file.read_text())


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_less_lives_where_more_is_derived_and_all_ways_have_stocks_gradients(tiny, model):
    found = tiny[1]["steps"][model]
    live = {way: found[way]["live_bytes"] for way in ("stock", "invact", "exact", "selective", "full")}
    assert max(live["invact"], live["exact"]) < live["selective"] < live["stock"]
    assert live["full"] < live["selective"]
    for way in live:
        assert found[way]["ratio"] > 0
        assert found[way]["gradients_off"] < 1e-5
    assert found["exact"]["gradients_off"] == 0


def test_what_the_host_pays_is_told_for_the_step_and_for_each_tensor(tiny):
    found = tiny[1]["host"]
    assert {"stock", "hooks of nothing", "invact", "exact"} <= found["bert"].keys()
    assert found["microseconds"].keys() == {"by hooks of nothing", "kept", "derived"}


def test_exact_is_bit_for_bit_wherever_stock_repeats_itself(tiny):
    found = {name: each for name, each in tiny[1]["exact"].items() if isinstance(each, dict)}
    assert len(found) == 12
    for name, each in found.items():
        assert each["exact_bit_for_bit"] or not each["stock_repeats_itself"], name
        assert each["invact_off"] < (1e-5 if "fp32" in name else 0.02), name
        assert each["invact_saving"] > 0, name


def test_the_file_names_versions_and_kind_of_machine_and_no_path(tiny):
    printed, found = tiny
    assert {"torch", "Python", "transformers"} <= found["versions"].keys()
    assert found["machine"]["cpu"]
    assert str(Path.home()) not in json.dumps(found)
    assert "steps bert" in printed
