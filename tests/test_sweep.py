"""The sweep over every model class: three families in each run, five more in the slow one, all in the sweep itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SWEEP = Path(__file__).parent / "sweep"
FAMILIES = ["bert/BertModel", "convnext/test_convnext", "ViT-B-16-quickgelu"]
MORE_FAMILIES = [
    "llama/LlamaForCausalLM",
    "qwen3_moe/Qwen3MoeModel",
    "clip/CLIPModel",
    "wav2vec2/Wav2Vec2Model",
    "mobilenetv3/mobilenetv4_conv_small",
]


def swept(results, *arguments):
    """The sweep's results by class name."""
    command = [sys.executable, str(SWEEP), "--results", str(results), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = [json.loads(line) for line in results.read_text().splitlines()]
    return {result["name"]: result for result in found}


AMPLIFIES_ROUNDING = "mobilevitv2/MobileViTV2Model"
REFUSES_ITSELF = "gemma4_assistant/Gemma4AssistantForCausalLM"


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    results = tmp_path_factory.mktemp("sweep") / "results.jsonl"
    return swept(results, "--match", *FAMILIES, AMPLIFIES_ROUNDING, REFUSES_ITSELF)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_small_model_of_a_family_keeps_every_promise(three, name):
    assert_promises_kept(three[name])


@pytest.mark.slow
def test_small_models_of_more_families_keep_every_promise(tmp_path):
    found = swept(tmp_path / "results.jsonl", "--match", *MORE_FAMILIES)
    for name in MORE_FAMILIES:
        assert_promises_kept(found[name])


def assert_promises_kept(result):
    assert result["status"] == "passed", result
    assert result["sites"] > 0
    assert result["derived"] > 0


def test_a_model_that_amplifies_every_rounding_is_held_against_float64(three):
    found = three[AMPLIFIES_ROUNDING]
    assert found["status"] == "passed", found
    assert 1e-4 < found["gradient_error"] < 3 * found["rounding_error"]


def test_a_class_whose_default_configuration_the_library_refuses_is_not_built_and_ends_nothing(three):
    assert three[REFUSES_ITSELF]["status"] == "not built"
    assert "must be 0" in three[REFUSES_ITSELF]["why"]


@pytest.mark.slow
def test_results_are_resumed_and_written_as_a_table(three, tmp_path):
    results, page = tmp_path / "results.jsonl", tmp_path / "models.md"
    results.write_text("".join(json.dumps(result) + "\n" for result in three.values()))
    found = swept(results, "--match", "bert/*", "--resume", "--table", str(page))
    assert found.keys() - three.keys() == {"bert/BertLMHeadModel"}
    assert len(results.read_text().splitlines()) == len(three) + 1
    written = page.read_text()
    assert "| bert/BertLMHeadModel | 3 | 3 |" in written
    assert " were not run." in written


def test_a_sweep_whose_time_is_up_begins_no_class(tmp_path):
    assert not swept(tmp_path / "results.jsonl", "--match", "bert/*", "--minutes", "0")


@pytest.mark.slow
def test_of_all_classes_that_can_be_built_95_percent_pass_and_none_fails_by_our_fault(tmp_path):
    found = swept(tmp_path / "results.jsonl").values()
    built = [result for result in found if result["status"] != "not built"]
    passed = [result for result in built if result["status"] == "passed"]
    assert not [result for result in built if result["status"] in ("failed", "crashed")]
    assert len(passed) >= 0.95 * len(built)
