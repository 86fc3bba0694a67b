"""The two-sided curves as formulas in mpmath: all that their polynomials are made from."""

from __future__ import annotations

import math

from .forty_digits import Function, mp
from .pieces import Fit, Piece

DEFINITIONS: dict[str, Function] = {
    "gelu": lambda x: x * mp.erfc(-x / mp.sqrt(2)) / 2,
    # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)), and the right-hand side keeps its digits on the far left
    "gelu_tanh": lambda x: x / (1 + mp.exp(-2 * mp.sqrt(2 / mp.pi) * (x + mp.mpf("0.044715") * x**3))),
    "quick_gelu": lambda x: x / (1 + mp.exp(-mp.mpf("1.702") * x)),
    "silu": lambda x: x / (1 + mp.exp(-x)),
    "mish": lambda x: x * mp.tanh(mp.log1p(mp.exp(x))),
}

# The c of 1 / (s + c): a curve that falls like a Gaussian is straightest with a large one, one that falls like an
# exponential with a small one.
TAIL_OFFSETS = {"gelu": 8.0, "gelu_tanh": 4.0, "quick_gelu": 1.0, "silu": 1.0, "mish": 1.0}

# Hardswish is r^2 - 3/8 with r = (x + 3/2) / sqrt(6), so f' = 2 r / sqrt(6): one term, exact. On the left f' falls to 0
# where y does and stays there; on the right it jumps from 3/2 to 1 at y = 3, and the rounded root must not miss that.
HARDSWISH_SLOPE = 2 / math.sqrt(6)
EXACT = {
    "hardswish": Fit(
        x_min=-1.5,
        y_min=-0.375,
        y_min_low=0.0,
        tail_start=0.0,
        tail_offset=1.0,
        near=Piece(-math.sqrt(0.375), 1.0, (HARDSWISH_SLOPE,)),
        right=Piece(1.0, math.sqrt(3.375), (HARDSWISH_SLOPE,)),
        tail=None,
    )
}
