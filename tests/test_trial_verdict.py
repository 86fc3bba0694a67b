"""Which way of training a trial says is the one to use, judged on made-up figures."""

from __future__ import annotations

import pytest

from invact.trial.verdict import Yardsticks, judge
from invact.trial.way_result import Run

SEEDS = Yardsticks(spread=0.4, finals=[1.0, 1.02])
ONE_SEED = Yardsticks()


def run(name: str, kept: int, seconds: float = 1.0, difference: float = 0.0, at_the_end: float = 0.0, **more) -> Run:
    losses, finals = [2.0, 1.0], [1.0 + at_the_end, 1.02]
    return Run(name, kept, None, seconds, losses, [losses, losses], difference, finals, **more)


BASELINE, INVACT = run("baseline", 1000), run("invact", 600, 1.05, 1e-6, 1e-7)
BOTH = run("invact+checkpointing", 130, 1.4, 1e-6, 1e-7)


def test_the_fewest_bytes_are_the_ones_to_use_and_what_is_faster_is_named_with_its_price():
    said = judge([BASELINE, INVACT, run("checkpointing", 200, 1.3), BOTH], SEEDS)
    assert "use invact+checkpointing: of the ways whose losses stay within the spread between seeds" in said
    assert "13.0% of the baseline's at 1.40 times its time." in said
    faster = "checkpointing (20.0% of the baseline's at 1.30 times its time), invact (60.0% of the baseline's at 1.05"
    assert f"Where that time is too long: {faster}" in said


def test_what_is_slower_and_keeps_more_wins_nothing():
    said = judge([BASELINE, INVACT, run("selective", 700, 1.2)], SEEDS)
    assert "use invact:" in said
    assert "Nothing is won by: selective (70.0% of the baseline's at 1.20 times its time)." in said


@pytest.mark.parametrize(
    ("difference", "at_the_end", "why"),
    [
        (0.5, 0.0, "fewbit-1 has losses off by 0.5, more than the 0.4 between seeds"),
        (0.1, 0.05, "fewbit-1 has a final loss off by 0.05, more than the 0.02 between seeds"),
    ],
)
def test_losses_that_leave_the_spread_at_a_step_or_at_the_end_rule_a_way_out(difference, at_the_end, why):
    coarse = run("fewbit-1", 10, 1.0, difference, at_the_end)
    said = judge([BASELINE, INVACT, coarse], SEEDS)
    assert SEEDS.within_spread(coarse) is False
    assert "use invact:" in said
    assert f"Not: {why}." in said


def test_what_is_approximate_is_used_where_its_losses_stay_within_the_spread_and_invact_is_said_not_to_be():
    said = judge([BASELINE, INVACT, run("fewbit-4", 500, 1.0, 0.01, 0.001)], SEEDS)
    assert "use fewbit-4:" in said
    assert said.endswith("invact is not the one to use here: it keeps 600 B, fewbit-4 500 B.")


def test_one_seed_judges_no_approximation_and_takes_what_is_off_by_rounding():
    coarse, off = run("fewbit-4", 10), run("selective", 20, difference=0.5)
    said = judge([BASELINE, INVACT, coarse, off], ONE_SEED)
    assert ONE_SEED.within_spread(INVACT) is None
    assert "whose losses are the baseline's to rounding" in said
    assert "Not: fewbit-4 is approximate, which one seed does not judge; selective differs by 0.5, more than" in said


def test_bytes_of_all_processes_count():
    halves = run("compression", 500, 0.6, 0.001, 0.0001, processes=2)
    said = judge([BASELINE, INVACT, halves], SEEDS)
    assert "use invact:" in said
    assert "Nothing is won by: gradient compression in two processes (100.0% of the baseline's at 0.60" in said


def test_what_does_not_fit_the_memory_is_out_before_all_else():
    peaks = {"baseline": 2**30 + 2**20, "invact": 2**30, "selective": None, "fit": 2**29}
    kept = {"baseline": 1000, "invact": 600, "selective": 500, "fit": 550}
    runs = [run(name, kept[name], 1.05, predicted_peak_bytes=peak) for name, peak in peaks.items()]
    said = judge(runs, Yardsticks(0.4, [1.0, 1.02], memory_bytes=2**30))
    assert "use fit: of the ways that fit in 1.00 GiB and whose losses stay within" in said
    assert "baseline does not fit in 1.00 GiB, its peak is 1.00 GiB; " in said
    assert "invact does not fit" not in said
    assert "selective is not predicted to fit in 1.00 GiB" in said


def test_where_none_is_predicted_a_measured_peak_says_whether_it_fits():
    measure = Yardsticks(0.4, [1.0, 1.02], memory_bytes=1000)
    small, large = run("exact", 10), run("exact", 10)
    small.peak_bytes, large.peak_bytes = 900, 1100
    assert measure.against_memory(small) is None
    assert measure.against_memory(large) == "does not fit in 1000 B, its peak is 1.1 KiB"
    small.predicted_peak_bytes = 1100
    assert measure.against_memory(small) is not None


def test_where_nothing_will_do_that_is_said():
    stock = run("baseline", 1000, predicted_peak_bytes=2**31)
    said = judge([stock], Yardsticks(0.4, [1.0, 1.02], memory_bytes=2**30))
    why = "baseline does not fit in 1.00 GiB, its peak is 2.00 GiB."
    assert said == f"None of these is the one to use here. Not: {why}"


def test_where_nothing_saves_the_baseline_is_the_one_to_use():
    said = judge([BASELINE, run("invact", 1000, 1.05)], SEEDS)
    assert "use no way at all, the baseline" in said
    assert "invact is not the one to use here" in said


def test_of_ways_with_the_same_bytes_the_faster_one_is_used():
    assert "use exact:" in judge([BASELINE, INVACT, run("exact", 603, 1.01)], SEEDS)


def test_a_trial_that_was_interrupted_before_two_seeds_ended_is_judged_by_its_steps():
    runs = [run("baseline", 1000), run("invact", 600, 1.05, 1e-6), run("fewbit-1", 10, 1.0, 0.5)]
    for one in runs:
        one.final_losses = one.final_losses[:1]
    measure = Yardsticks(spread=0.4, finals=[1.0])
    assert measure.final_spread is None
    assert [measure.within_spread(one) for one in runs] == [True, True, False]
