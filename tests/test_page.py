"""The page, in a real browser: it opens with nothing on the console and nothing asked of any network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from invact.cli import app
from invact.deriving.derived_tensor import DerivedTensor
from invact.fitting.simulated_training import simulated_training
from invact.pages.charts import loss_chart, memory_chart, timeline_chart
from invact.pages.page import plan_page, trial_page
from invact.planning.by_layer import Layer, layer_name
from invact.report.records import FusedNorm, Site
from invact.report.report import Report
from invact.simulation.setting import Setting
from invact.trial.comparing import train_in_ways
from invact.trial.result import Trial
from invact.trial.task import make_task
from invact.trial.verdict import Yardsticks
from invact.trial.way_result import Run

pytestmark = pytest.mark.usefixtures("one_thread")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
QUIET = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
ALONE = "--disable-component-update --disable-sync --enable-logging=stderr --v=0"


@pytest.fixture(scope="module")
def html() -> str:
    trial = train_in_ways(make_task(), steps=3, batch_size=2, seeds=[0, 1], ways=["baseline", "invact"])
    return trial_page(trial, "invact trial --steps 3").html()


def shown(page: str, folder: Path) -> tuple[str, str]:
    """The document as the browser has it when it is loaded, and the browser's log."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    (folder / "page.html").write_text(page, encoding="utf-8")
    profile, address = f"--user-data-dir={folder / 'profile'}", (folder / "page.html").as_uri()
    browser = subprocess.run(
        [CHROMIUM, *QUIET.split(), *ALONE.split(), profile, "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return browser.stdout, browser.stderr


@pytest.fixture(scope="module")
def opened(html: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The page's document, in its title what was fetched for it; and the browser's log."""
    fetched = "performance.getEntriesByType('resource').map(entry => entry.name).join() || 'nothing'"
    script = f"<script>addEventListener('load', () => document.title = 'fetched: ' + ({fetched}))</script>"
    return shown(html.replace("</body>", f"{script}</body>"), tmp_path_factory.mktemp("page"))


def test_the_browser_shows_verdict_charts_tables_and_command(opened):
    document, _ = opened
    assert document.count("<svg") == 2
    assert document.count("<table") == 3
    assert "fewer bytes for backward" in document
    assert "invact trial --steps 3" in document


def test_the_browser_has_nothing_to_say(opened):
    _, log = opened
    assert "CONSOLE" not in log


def test_the_browser_asks_for_nothing(opened):
    assert "<title>fetched: nothing</title>" in opened[0]


@pytest.mark.parametrize(("pixels", "table"), [(390, "block"), (900, "table")])
def test_nothing_is_to_be_scrolled_sideways_for_on_a_phone_nor_on_a_desk(html, tmp_path: Path, pixels: int, table: str):
    # In a frame: a window of the browser is never as narrow as a phone.
    script = (
        "const page = frame.contentDocument, all = [page.documentElement, ...page.querySelectorAll('.wide')];"
        "document.title = all.filter(one => one.scrollWidth > one.clientWidth).length + ' too wide, '"
        "+ frame.contentWindow.getComputedStyle(page.querySelector('table')).display"
    )
    frame = f'<iframe id="frame" style="width: {pixels}px; height: 3000px" srcdoc="{escape(html)}"></iframe>'
    whole = f"<title></title>{frame}<script>addEventListener('load', () => {{ {script} }})</script>"
    document, _ = shown(whole, tmp_path)
    assert f"<title>0 too wide, {table}</title>" in document


def test_nothing_on_the_page_points_outside(html: str):
    assert re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']*""", html) == []
    assert not re.search(r"@import|url\((?!#)", html)


def test_charts_have_alternative_texts_and_ids_of_their_own(html: str):
    alternatives = re.findall(r'role="img" aria-label="([^"]+)"', html)
    assert len(alternatives) == 2
    assert "Most is saved in bert.encoder.layer.0" in alternatives[0]
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_dark_and_print_have_their_styles(html: str):
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert 'name="viewport"' in html


def test_what_a_model_is_called_can_not_write_into_the_page():
    site = Site("<b>path</b>", "gelu", "<img src=x>", "keep", "a < b")
    report = Report([site], title="<script>alert(1)</script>")
    layers = [Layer("<i>layer</i>", {"<u>Linear</u>": 10}, {"<u>Linear</u>": 10})]
    html = plan_page(report, layers, "invact patch --model '<script>'").html()
    assert not re.search(r"<(script|img|b>|i>|u>)", html)


def test_what_is_made_again_is_told_by_kind_with_its_cost_and_the_distance_from_the_floor():
    derived = [
        DerivedTensor("Norm's output", f"{n}.up", f"{n}.norm", "made again from a sum", 2**20, 2**21, 3)
        for n in range(2)
    ]
    report = Report(
        [], derived=derived, bytes_before=2**23, bytes_after=2**22, bytes_floor=2**21, remains={"attention": 2**22}
    )
    report.not_derived = {"i0: <b>no recipe</b>": 2**20}
    html = " ".join(plan_page(report, [], "invact patch").html().split())
    assert "2 tensors made again" in html
    row = next(row for row in html.split("<tr") if "Norm&#39;s output" in row)
    assert "<code>0.norm</code>, for <code>0.up</code> and 2 more" in row
    assert re.findall(r'class="number">([^<]+)<', row) == ["2", "2.0 MiB", "4.0 MiB"]
    assert "this plan is 100.0% above it" in html
    assert "i0: &lt;b&gt;no recipe" in html


def test_norms_in_one_operator_are_told_together_with_what_both_ways_move():
    fused = [FusedNorm(f"{n}.norm", "<b>Norm", "its steps move more", 2**23, 2**20) for n in range(3)]
    html = " ".join(plan_page(Report([], fused=fused), [], "invact patch").html().split())
    assert "3 norms in one operator" in html
    row = next(row for row in html.split("<tr") if "its steps move more" in row)
    assert "<code>0.norm</code> &lt;b&gt;Norm" in row
    assert re.findall(r'class="number">([^<]+)<', row) == ["3", "24.0 MiB", "3.0 MiB"]
    assert "norms in one operator" not in plan_page(Report([]), [], "invact patch").html()


def test_layers_are_told_by_their_first_number():
    assert layer_name("layers.2.blocks.5.mlp") == "layers.2"


def test_the_chart_says_where_most_is_saved():
    layers = [Layer("one", {"GELU": 30}, {"GELU": 20}), Layer("two", {"GELU": 90, "Linear": 5}, {"Linear": 5})]
    chart = memory_chart(layers)
    assert "125 B before, 25 B after. Most is saved in two: 95 B before, 5 B after" in chart.alternative


def test_neighbours_that_keep_the_same_share_a_bar_in_a_deep_model_only():
    def drawing(depth: int) -> str:
        blocks = [Layer(f"blocks.{number}", {"GELU": 9}, {"GELU": 5}) for number in range(depth)]
        return memory_chart([*blocks, Layer("blocks.99", {"GELU": 7}, {"GELU": 5})]).svg

    assert re.findall(r">(blocks[^<]*)<", drawing(30)) == ["blocks.0-29, each", "blocks.99"]
    assert re.findall(r">(blocks[^<]*)<", drawing(3)) == ["blocks.0", "blocks.1", "blocks.2", "blocks.99"]


def test_the_name_of_a_layer_deep_inside_takes_two_lines():
    svg = memory_chart([Layer("visual.transformer.resblocks.0", {"GELU": 9}, {"GELU": 5})]).svg
    assert re.findall(r">(visual[^<]*|resblocks[^<]*)<", svg) == ["visual.transformer.", "resblocks.0"]


def test_the_course_of_a_step_says_where_it_is_highest_and_draws_the_budget():
    model, inputs = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), (torch.randn(64, 64),)
    with simulated_training(model, inputs, Setting(torch.device("cpu")), "adamw") as take_step:
        step = take_step()
    chart = timeline_chart(step, step, memory_bytes=1 << 20)
    assert f"{step.peak_bytes / 1024:.1f} KiB at the highest, in " in chart.caption
    assert step.where(step.highest) in chart.alternative
    kinds = ("weights", "optimizer states", "gradients", "kept for backward", "temporary")
    assert all(f">{words}<" in chart.svg for words in (*kinds, "before", "the budget", "forward", "backward"))
    assert ">the budget<" not in timeline_chart(step, step).svg


def test_dry_run_writes_the_page_without_training(tmp_path: Path):
    page = tmp_path / "page.html"
    arguments = ["--model", "timm/test_vit", "--batch-size", "2", "--html", str(page), "--json"]
    result = CliRunner().invoke(app, ["patch", *arguments])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bytes_after"] > 0
    html = page.read_text(encoding="utf-8")
    assert html.count("<svg") == 2
    assert "blocks.0" in html
    assert "The course of a step from forward over backward to the optimizer, highest at" in html
    assert "The ways of training" not in html


def test_the_losses_of_more_ways_than_there_are_line_styles_are_drawn():
    losses = [2.0, 1.5, 1.0]
    runs = [Run(f"way {n}", 100, None, 1.0, losses, [losses]) for n in range(11)]
    trial = Trial("a model", "3 steps", runs, Yardsticks(), Report([]), [])
    assert loss_chart(trial).svg.startswith("<svg")
