"""Each decision against what it leads to: a site is inverted exactly where fewer bytes are then kept."""

import pytest
import torch
from decision_cases import CASES

import invact
from invact.kernels import CURVES
from invact.recognition.dependencies_of_modules import dependencies_of_module
from invact.swapping.inversion import Inversion
from invact.swapping.swaps import swap_in


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_site_is_inverted_exactly_where_fewer_bytes_are_then_kept(case, count_kept, run_backward):
    model, x = case(), torch.randn(64, 4, 16)  # as many elements as it takes to be inverted and not derived
    kept, (_, gradient) = count_kept(model, (x,)), run_backward(model, (x,))
    report = invact.plan(model, (x,))
    (site,) = report.sites
    assert site.reason == case.__doc__
    assert report.bytes_before == kept

    inversion = {"act": Inversion(CURVES[site.activation], dependencies_of_module(model.act))}
    swaps = swap_in(model, inversion, {})
    inverted = count_kept(model, (x,))
    if site.reason != "its output is changed in place later":  # inverted, its backward raises an error
        found = run_backward(model, (x,))[1]
        assert (found - gradient).norm() < 1e-4 * gradient.norm()
        assert (site.action == "invert") == (inverted < kept)
    assert (site.action == "derive") == site.reason.startswith("its output is made again")
    swaps.undo()
    swap_in(model, inversion if site.action == "invert" else {}, {}, {"": True})
    assert report.bytes_after == count_kept(model, (x,))
    assert site.bytes_saved == (kept - inverted if site.action == "invert" else 0)
