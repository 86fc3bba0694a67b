"""What the README says is what the tool says."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

README = (Path(__file__).parents[1] / "README.md").read_text()
ROWS = re.findall(r"^\| .+? \| `(.+?)` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", README, flags=re.MULTILINE)
ROWS = [row for row in ROWS if row[0] != "invact patch --model"]
VERSION = re.findall(r"^Planned .*\btorch ([\d.]+),", README, flags=re.MULTILINE)[0]


def test_the_table_was_found():
    assert len(ROWS) >= 8


# The rest of the table is left to the slow run: models of the same build as one that is here, and the largest.
IN_THE_SLOW_RUN = (
    *("answerdotai/ModernBERT-base", "open_clip/ViT-B-32-quickgelu", "openai/clip-vit-base-patch32"),
    *("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B --lora-rank 16", "timm/convnext_base"),
)


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row[0], marks=[pytest.mark.slow] if row[0] in IN_THE_SLOW_RUN else []) for row in ROWS],
)
def test_the_tables_figures_are_what_the_command_prints(row):
    from invact.cli import app

    command, before, after, saved, of_the_loss = row
    result = CliRunner().invoke(app, ["patch", "--model", *shlex.split(command)])
    assert result.exit_code == 0, result.output
    printed = re.search(r"(\S+ \wiB) before, (\S+ \wiB) after: (\S+)% saved", result.output)
    assert printed is not None
    loss = re.search(r"are the loss's, (\S+)%", " ".join(result.output.split()))
    assert (loss is None) == (of_the_loss == "-")
    # From 2.15 on a GPU's tensors need no stand-ins, and totals differ in the last digit.
    exactly = torch.__version__.partition("+")[0] == VERSION
    figures, told = [*printed.groups()], [before, after, saved]
    if loss is not None:
        figures.append(loss[1])
        told.append(of_the_loss)
    for ours, theirs in zip(figures, told, strict=True):
        assert ours.split()[1:] == theirs.split()[1:]
        ours, theirs = (float(figure.split()[0].rstrip("%")) for figure in (ours, theirs))
        assert ours == theirs if exactly else ours == pytest.approx(theirs, rel=0.005)


def test_the_two_commands_are_there_for_ci_to_run():
    commands = re.findall(r"^python3 -m venv .*$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    assert "invact patch --model bert-base-uncased" in commands[0]
    assert "pytest" in commands[1]
