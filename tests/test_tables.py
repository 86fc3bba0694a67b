"""Tables in consoles of any width: nothing is lost, nor wider than the console, nor a column of single letters."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from invact.report.records import INVERT, KEEP, Site
from invact.report.report import Report
from invact.report.tables import Column, print_table

WIDTHS = [40, 60, 80, 100, 120, 200]
REASON = "LayerNorm keeps nothing of its output; inverting would keep one tensor more than it frees"
SITES = [
    Site("bert.encoder.layer.0.intermediate.intermediate_act_fn", "gelu", "GELUActivation", INVERT, "it pays", 2**20),
    Site("cls.predictions.transform.transform_act_fn", "gelu_tanh", "F.gelu(x[0], approximate=…)", KEEP, REASON),
]


def printed(what, width: int) -> str:
    text = io.StringIO()
    what.print(Console(file=text, width=width))
    return text.getvalue()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_report_keeps_to_the_width_and_loses_nothing(width):
    lines = printed(Report(SITES, 100, 50), width).splitlines()
    assert max(map(len, lines)) <= width
    together = "".join("".join(lines).split())
    for site in SITES:
        for word in (*site.reason.split(), site.activation, site.action):
            assert word in together


@pytest.mark.parametrize("width", WIDTHS)
def test_words_of_a_reason_stay_whole(width):
    words = printed(Report(SITES, 100, 50), width).split()
    assert set(REASON.split()) <= set(words)


@pytest.mark.parametrize(("width", "side_by_side"), [(60, False), (100, True)])
def test_columns_that_do_not_fit_stand_below_each_other(width, side_by_side):
    text = printed(Report(SITES, 100, 50), width)
    assert ("───" in text) == side_by_side
    assert text.count("reason") == (1 if side_by_side else len(SITES))


def test_a_report_as_a_string_is_120_wide_whatever_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    widths = [len(line) for line in str(Report(SITES, 100, 50)).splitlines()]
    assert 100 < max(widths) <= 120


def table(width: int, **options) -> list[str]:
    columns = [Column("pass"), Column("contender"), Column("kept besides y", right=True)]
    rows = [["forward", "stock", "16 KiB"], ["forward", "invact", ""], ["backward", "stock", "16 KiB"]]
    text = io.StringIO()
    print_table(Console(file=text, width=width), columns, rows, **options)
    return [line.strip() for line in text.getvalue().splitlines() if line.strip()]


def test_the_name_of_a_column_is_wrapped_before_the_table_is_given_up():
    assert any(line.endswith("besides y") for line in table(36))
    assert any("kept besides y" in line for line in table(60))


def test_a_group_is_named_once_side_by_side_and_in_every_row_below_each_other():
    assert sum("forward" in line for line in table(60, grouped=True)) == 1
    assert sum("forward" in line for line in table(30, grouped=True)) == 2


def test_an_empty_cell_is_left_out_below_each_other():
    assert sum(line.startswith("kept besides y") for line in table(30)) == 2
