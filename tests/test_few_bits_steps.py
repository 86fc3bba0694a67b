"""The steps that approximate a derivative are the best there are, and codes choose the step that a value lies on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from steps_apart import BITS, EVERY_CURVE, EVERY_NUMBER_OF_BITS, POINTS, WEIGHTS, mean_square_error, step_of

from invact.kernels import CURVES, Curve, codes
from invact.kernels.curves import monotone_families
from invact.kernels.few_bits import packing as code_packing
from invact.kernels.few_bits.step_functions import Steps, best_steps, steps

# --- the steps ----------------------------------------------------------------------------------------


@EVERY_CURVE
def test_no_bound_gives_two_better_values_than_one_bit_has(curve: Curve) -> None:
    slopes = curve.derivative(POINTS)
    weight, first = WEIGHTS.cumsum(0), (WEIGHTS * slopes).cumsum(0)
    inside = POINTS.abs() < 5
    left, right = first[inside], first[-1] - first[inside]
    gained = left.square() / weight[inside] + right.square() / (weight[-1] - weight[inside])
    best = float((WEIGHTS * slopes.square()).sum() - gained.max())
    assert mean_square_error(curve, steps(curve, 1)) <= best + 1e-7


@EVERY_CURVE
@EVERY_NUMBER_OF_BITS
def test_moving_a_bound_or_a_value_makes_no_better_steps(curve: Curve, bits: int) -> None:
    by = steps(curve, bits)
    least = mean_square_error(curve, by)
    assert len(by.values) == len(by.bounds) + 1 == 1 << bits
    assert list(by.bounds) == sorted(by.bounds)
    for change, at in itertools.product((-0.02, 0.02), range(len(by.values))):
        values = [value + change * (i == at) for i, value in enumerate(by.values)]
        assert mean_square_error(curve, Steps(by.bounds, tuple(values))) >= least
        if at < len(by.bounds):
            bounds = sorted(bound + change * (i == at) for i, bound in enumerate(by.bounds))
            assert mean_square_error(curve, Steps(tuple(bounds), by.values)) >= least - 1e-9


@EVERY_CURVE
def test_every_bit_makes_the_error_less_until_there_is_none(curve: Curve) -> None:
    errors = [mean_square_error(curve, steps(curve, bits)) for bits in BITS]
    for more, less in itertools.pairwise(errors):
        assert less < more / 2 or more < 1e-8
    assert errors[-1] < 6e-3


# Of fewbit's own tables (github.com/skolai/fewbit), for a weight that is the same from -100 to 100; those of them at
# which its search, which starts at random, arrived at the best.
PUBLISHED = {
    ("gelu", 1): ([0.0], [0.0, 1.0]),
    ("gelu", 2): ([-0.45359, 0.0, 0.45361], [-0.00148, 0.32506, 0.67495, 1.00148]),
    ("gelu", 3): (
        [-2.41658, -0.71001, -0.32584, 0.00011, 0.32606, 0.71024, 2.41448],
        [-0.00019, -0.08828, 0.12568, 0.37231, 0.62785, 0.87445, 1.08835, 1.00019],
    ),
    ("silu", 2): ([-0.74328, 0.0, 0.74332], [-0.00241, 0.3223, 0.67773, 1.00241]),
}


@pytest.mark.parametrize(("name", "bits"), PUBLISHED)
def test_under_fewbits_own_weight_the_steps_are_those_that_it_published(name: str, bits: int) -> None:
    found = best_steps(CURVES[name].derivative, torch.ones_like, 1 << bits, 100.0)
    bounds, values = PUBLISHED[name, bits]
    assert found.bounds == pytest.approx(bounds, abs=2e-3)
    assert found.values == pytest.approx(values, abs=3e-4)


def test_a_derivative_of_few_values_has_as_many_steps_each_where_it_jumps() -> None:
    assert steps(CURVES["relu6"], 2).bounds == (pytest.approx(0, abs=1e-12), 6.0, math.inf)
    assert steps(CURVES["relu6"], 2).values == pytest.approx((0.0, 1.0, 0.0, 0.0), abs=1e-12)
    clamped = steps(monotone_families.hardtanh(-0.3, 0.7), 3)
    assert clamped.bounds[:3] == (pytest.approx(-0.3, abs=1e-15), 0.7, math.inf)
    assert clamped.values == pytest.approx((0.0, 1.0, *[0.0] * 6), abs=1e-12)
    leaky = steps(monotone_families.leaky_relu(0.2), 1)
    assert leaky.values == pytest.approx((0.2, 1.0), abs=1e-12)
    x = torch.tensor([-1.0, 0.0, 1e-30])  # at 0 a LeakyReLU has the left one's slope
    assert codes.codes(x, leaky).tolist() == [0, 0, 1]
    assert codes.codes(x.half(), leaky).tolist() == [0, 0, 0]  # where 1e-30 is 0


def test_steps_are_the_same_object_for_the_same_curve_whatever_mode_they_are_first_asked_for_in() -> None:
    curve = monotone_families.elu(0.123)
    with torch.inference_mode(), torch.device("meta"):
        found = steps(curve, 2)
    assert steps(curve, 2) is found
    assert all(math.isfinite(number) for number in (*found.bounds, *found.values))


# --- the codes ----------------------------------------------------------------------------------------


@EVERY_CURVE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_16_bits_chooses_the_step_that_it_lies_on(curve: Curve, dtype: torch.dtype) -> None:
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    for bits in BITS:
        by = steps(curve, bits)
        found = code_packing.unpacked(codes.packed_codes(x, by), len(x), bits)
        known = ~x.isnan()
        assert torch.equal(found[known].long(), step_of(x[known], by))
        assert (found[~known] == (1 << bits) - 1).all()


@EVERY_NUMBER_OF_BITS
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 4095, 300_001])
def test_codes_come_back_from_exactly_k_bytes_for_each_eight(bits: int, count: int) -> None:
    chosen = torch.randint(0, 1 << bits, (count,), dtype=torch.uint8)
    packed = code_packing.packed(chosen, bits)
    assert packed.numel() == -(-count // 8) * bits == code_packing.nbytes(count, bits)
    assert torch.equal(code_packing.unpacked(packed, count, bits), chosen)


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    assert code_packing.packed(torch.tensor([1, 0, 1, 1, 0, 0, 0, 1], dtype=torch.uint8), 1).tolist() == [0b10001101]
    assert code_packing.packed(torch.tensor([3, 0, 1, 2, 1], dtype=torch.uint8), 2).tolist() == [0b10_01_00_11, 0b01]
    word = sum(code << 3 * place for place, code in enumerate([1, 2, 3, 4, 5, 6, 7, 0]))
    packed = code_packing.packed(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8), 3)
    assert packed.tolist() == list(word.to_bytes(3, "little"))
    assert code_packing.packed(torch.tensor([10, 5, 15], dtype=torch.uint8), 4).tolist() == [0x5A, 0x0F, 0, 0]
