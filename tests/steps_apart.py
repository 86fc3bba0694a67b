"""Steps of a derivative, looked up apart from the kernels, and what tests of them go over."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from invact.kernels import CURVES, Curve
from invact.kernels.curves import monotone_families
from invact.kernels.few_bits.step_functions import Steps

BITS = (1, 2, 3, 4)
EVERY_NUMBER_OF_BITS = pytest.mark.parametrize("bits", BITS)
EVERY_CURVE = pytest.mark.parametrize("curve", [*CURVES.values(), monotone_families.hardtanh(-0.3, 0.7)], ids=str)
POINTS = (torch.arange(1 << 14, dtype=torch.float64) + 0.5) / (1 << 10) - 8
WEIGHTS = torch.exp(-POINTS.square() / 2) / math.sqrt(2 * math.pi) / (1 << 10)


def step_of(x: Tensor, by: Steps) -> Tensor:
    """Written apart from `codes`: by a search, in fp64."""
    return torch.bucketize(x.double().contiguous(), torch.tensor(by.bounds, dtype=torch.float64), right=True)


def mean_square_error(curve: Curve, by: Steps, points: Tensor = POINTS, weights: Tensor = WEIGHTS) -> float:
    stepped = torch.tensor(by.values, dtype=torch.float64)[step_of(points, by)]
    return float((weights * (stepped - curve.derivative(points)).square()).sum())
