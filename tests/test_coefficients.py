"""The coefficients that are checked in are those that the fitting script makes."""

from __future__ import annotations

import sys

import pytest
import torch

from invact.kernels import CURVES, Curve
from invact.kernels.curves.two_sided import TWO_SIDED, TwoSided


@pytest.mark.parametrize(
    "curves", [["silu"], pytest.param([curve.name for curve in TWO_SIDED], marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_fitting_again_gives_what_is_checked_in(
    curves: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mpmath")
    from invact.kernels.polynomials import generate

    monkeypatch.setattr(generate, "DEFINITIONS", [name for name in generate.DEFINITIONS if name in curves])
    monkeypatch.setattr(sys, "argv", ["generate", "--check"])
    failed = generate.main()
    printed = capsys.readouterr()
    assert not failed, printed.err
    assert "error" in printed.out


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES.keys())
def test_the_derivative_of_a_curve_is_that_of_its_operator(curve: Curve) -> None:
    x = torch.linspace(-12.1, 12, 4000, dtype=torch.float64, requires_grad=True)
    (stock,) = torch.autograd.grad(curve.f(x).sum(), x)
    # stock's hardsigmoid multiplies by a sixth in fp32
    rtol = 1e-7 if curve.name == "hardsigmoid" else 1e-10
    torch.testing.assert_close(curve.derivative(x.detach()), stock, atol=1e-13, rtol=rtol)


@pytest.mark.parametrize("curve", TWO_SIDED, ids=str)
def test_the_minimum_of_a_curve_is_where_it_says(curve: TwoSided) -> None:
    at = torch.tensor([curve.x_min], dtype=torch.float64)
    assert curve.f(at).item() == pytest.approx(curve.y_min, abs=1e-16)
    assert curve.derivative(at).item() == pytest.approx(0, abs=1e-15)
