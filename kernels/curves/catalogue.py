"""Every curve there is, by name: those that come with invact, and those that a program has registered."""

from __future__ import annotations

from collections.abc import Callable

from . import guesses, monotone_families
from .curve import Curve
from .guesses import Values
from .monotone_fixed import MONOTONE
from .two_sided import TWO_SIDED

CURVES: dict[str, Curve] = {}
"""All of them; of a family, such as ELU, the one with the default parameters."""

FIXED_CURVES: list[Curve] = []
"""Those of no family, in the order in which they are tried on a module."""

GUESSES: list[Callable[[Values], Curve | None]] = []
"""Of each family, what finds its parameters from values of f; None where it can be no such curve."""


def add(curve: Curve, guess: Callable[[Values], Curve | None] | None = None) -> None:
    """Puts a curve into the catalogue; with a guess, as the default one of a family.

    Raises:
        ValueError: its name is taken.
    """
    if curve.name in CURVES:
        raise ValueError(f"There is a curve called {curve.name!r} already. Give yours another name.")
    CURVES[curve.name] = curve
    if guess is None:
        FIXED_CURVES.append(curve)
    else:
        GUESSES.append(guess)


for _curve in (*TWO_SIDED, *MONOTONE):
    add(_curve)
add(monotone_families.elu(), guesses.guessed_elu)
add(monotone_families.celu(), guesses.guessed_celu)
add(monotone_families.leaky_relu(), guesses.guessed_leaky_relu)
add(monotone_families.hardtanh(), guesses.guessed_hardtanh)
add(monotone_families.softplus(), guesses.guessed_softplus)

OURS = frozenset(CURVES)
"""The names of those that come with invact: the kernels in Triton know them, with any parameters, and no others."""
