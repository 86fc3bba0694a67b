"""Approximate derivatives: the best steps there are, k bits kept an element, and only where somebody asks for them."""

from __future__ import annotations

import copy
import doctest
import itertools
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import kept_bytes
from invact.kernels import CURVES, Curve, codes
from invact.kernels.curves import monotone_families
from invact.kernels.few_bits import packing as code_packing
from invact.kernels.few_bits import steps as steps_module
from invact.kernels.few_bits.steps import Steps, best_steps, steps
from test_decisions import CASES, DroppedAndShared
from test_functional import VIEWS
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import invact
from invact import patching
from invact.cli import app
from invact.errors.checks import check_few_bits
from invact.inverting import few_bits as few_bits_module
from invact.inverting.few_bits import few_bits
from invact.planning.plans import decide_for_device
from invact.trial.fewbit import approximate_everywhere

BITS = (1, 2, 3, 4)
EVERY_NUMBER_OF_BITS = pytest.mark.parametrize("bits", BITS)
EVERY_CURVE = pytest.mark.parametrize("curve", [*CURVES.values(), monotone_families.hardtanh(-0.3, 0.7)], ids=str)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)

POINTS = (torch.arange(1 << 14, dtype=torch.float64) + 0.5) / (1 << 10) - 8
WEIGHTS = torch.exp(-POINTS.square() / 2) / math.sqrt(2 * math.pi) / (1 << 10)


def step_of(x: Tensor, by: Steps) -> Tensor:
    """Written apart from `codes`: by a search, in fp64."""
    return torch.bucketize(x.double().contiguous(), torch.tensor(by.bounds, dtype=torch.float64), right=True)


def mean_square_error(curve: Curve, by: Steps, points: Tensor = POINTS, weights: Tensor = WEIGHTS) -> float:
    stepped = torch.tensor(by.values, dtype=torch.float64)[step_of(points, by)]
    return float((weights * (stepped - curve.derivative(points)).square()).sum())


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


# --- the operator -------------------------------------------------------------------------------------


def stepped_gradient(x: Tensor, dy: Tensor, by: Steps) -> Tensor:
    """dy times the step's value in fp32, or in fp64 for fp64, rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (dy.to(wide) * torch.tensor(by.values, dtype=wide)[step_of(x, by)]).to(dy.dtype)


@EVERY_CURVE
@EVERY_DTYPE
@pytest.mark.parametrize("bits", [1, 3])
def test_the_output_is_stocks_and_the_gradient_a_step_times_dy(curve: Curve, dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(33, 57).mul(2).to(dtype).requires_grad_()
    dy = torch.randn(33, 57).to(dtype)
    y = few_bits(x, curve, bits)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(y, curve.f(x.detach()))
    assert dx.dtype == dtype
    assert torch.equal(dx, stepped_gradient(x.detach(), dy, steps(curve, bits)))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_outputs_and_gradients_are_laid_out_as_stocks(view: Callable[[Tensor], Tensor]) -> None:
    curve, by = CURVES["gelu"], steps(CURVES["gelu"], 3)
    x = view(torch.randn(3, 8, 4, 6)).detach().requires_grad_()
    stock, ours = F.gelu(x), few_bits(x, curve, 3)
    assert torch.equal(ours, stock)
    assert ours.stride() == stock.stride()
    for dy in (torch.randn_like(stock), torch.randn(()).expand(stock.shape), torch.randn(stock.shape)):
        (expected,) = torch.autograd.grad(F.gelu(x), x, dy)
        (dx,) = torch.autograd.grad(few_bits(x, curve, 3), x, dy)
        assert torch.equal(dx, stepped_gradient(x.detach(), dy, by))
        assert dx.shape == expected.shape


@EVERY_NUMBER_OF_BITS
def test_on_normal_inputs_the_gradient_is_off_by_what_the_steps_say(bits: int) -> None:
    torch.manual_seed(0)
    curve, x = CURVES["gelu"], torch.randn(200_000, dtype=torch.float64, requires_grad=True)
    few_bits(x, curve, bits).sum().backward()
    assert x.grad is not None
    error = (x.grad - curve.derivative(x.detach())).square().mean()
    assert error == pytest.approx(mean_square_error(curve, steps(curve, bits)), rel=0.05)


class Activation(nn.Module):
    def __init__(self, bits: int, inplace: bool = False) -> None:
        super().__init__()
        self.bits, self.inplace = bits, inplace

    def forward(self, x: Tensor) -> Tensor:
        return few_bits(x * 1, CURVES["silu"], self.bits, self.inplace)


@EVERY_NUMBER_OF_BITS
@EVERY_DTYPE
@pytest.mark.parametrize("inplace", [False, True])
def test_k_eighths_of_a_byte_are_kept_an_element_and_nothing_else(bits: int, dtype: torch.dtype, inplace: bool) -> None:
    x = torch.randn(40, 80, dtype=dtype, requires_grad=True)
    model = Activation(bits, inplace)
    assert kept_bytes(model, (x,)) == 3200 * bits // 8
    assert invact.activation_memory(model, (x,)).total_bytes == 3200 * bits // 8
    odd = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    assert kept_bytes(model, (odd,)) == 2 * bits


def test_without_a_gradient_nothing_is_kept_and_the_stock_operator_runs() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    with torch.no_grad():
        y = few_bits(x, CURVES["gelu"], 2)
    assert y.grad_fn is None
    assert few_bits(x.detach(), CURVES["gelu"], 2).grad_fn is None


def test_empty_tensors_and_single_numbers_have_gradients() -> None:
    for shape in ((0,), (3, 0), ()):
        x = torch.ones(shape, requires_grad=True)
        (dx,) = torch.autograd.grad(few_bits(x, CURVES["gelu"], 3).sum(), x)
        assert dx.shape == shape


def test_in_place_the_output_takes_the_memory_of_the_input() -> None:
    x = torch.randn(64, requires_grad=True)
    inner = x * 1
    before = inner.detach().clone()
    y = few_bits(inner, CURVES["mish"], 2, inplace=True)
    assert y.data_ptr() == inner.data_ptr()
    assert torch.equal(y, F.mish(before))
    (dx,) = torch.autograd.grad(y, x, torch.ones(64))
    assert torch.equal(dx, stepped_gradient(before, torch.ones(64), steps(CURVES["mish"], 2)))


def test_the_output_may_be_changed_in_place_since_nobody_needs_it() -> None:
    x = torch.randn(64, requires_grad=True)
    few_bits(x, CURVES["silu"], 2).mul_(2).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, stepped_gradient(x.detach(), torch.full((64,), 2.0), steps(CURVES["silu"], 2)))


def test_a_second_derivative_is_refused_with_what_to_do() -> None:
    x = torch.randn(8, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"second derivative of gelu in steps of 8 values.*invact\.unpatch"):
        torch.autograd.grad(few_bits(x, CURVES["gelu"], 3).sum(), x, create_graph=True)


def test_inside_torch_func_and_forward_mode_the_stock_operator_gives_what_it_gives() -> None:
    x = torch.randn(8)
    ours = torch.func.grad(lambda x: few_bits(x, CURVES["gelu"], 1).sum())(x)
    assert torch.equal(ours, torch.func.grad(lambda x: F.gelu(x).sum())(x))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), torch.ones(8))
        tangent = forward_ad.unpack_dual(few_bits(dual, CURVES["gelu"], 1)).tangent
    assert torch.allclose(tangent, CURVES["gelu"].derivative(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_the_gradients_are_the_same(reentrant: bool) -> None:
    x = torch.randn(32, 16, requires_grad=True)
    model = Activation(3)
    (plain,) = torch.autograd.grad(model(x).square().sum(), x)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, plain)


def test_hooks_on_what_is_kept_see_the_codes_and_may_hand_back_a_copy() -> None:
    seen = []
    x = torch.randn(5, 16, requires_grad=True)

    def pack(kept: Tensor) -> Tensor:
        seen.append((kept.dtype, kept.numel()))
        return kept.clone()

    with saved_tensors_hooks(pack, lambda kept: kept):
        y = few_bits(x, CURVES["gelu"], 4)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert seen == [(torch.uint8, 40)]
    assert torch.equal(x.grad, stepped_gradient(x.detach(), torch.ones(5, 16), steps(CURVES["gelu"], 4)))


@pytest.mark.parametrize("bits", [1, 3])
def test_compiled_as_one_graph_it_keeps_the_codes_alone(bits: int) -> None:
    torch._dynamo.reset()
    x = torch.randn(16, 64, requires_grad=True)
    kept: list[Tensor] = []
    compiled = torch.compile(Activation(bits), fullgraph=True)
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        y = compiled(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert torch.equal(x.grad, stepped_gradient(x.detach(), torch.ones(16, 64), steps(CURVES["silu"], bits)))
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) == 1024 * bits // 8


def test_what_is_no_activations_input_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch.int64.*x\.float\(\)"):
        few_bits(torch.arange(3), CURVES["gelu"], 2)
    with pytest.raises(ValueError, match=r"few_bits is 5.*1 to 4"):
        few_bits(torch.randn(3), CURVES["gelu"], 5)


# --- what is asked for --------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [True, "3", 2.0, [1]])
def test_few_bits_that_are_no_number_are_told_what_to_pass(wrong: Any) -> None:
    with pytest.raises(TypeError, match="Pass 1, 2, 3 or 4, or None"):
        check_few_bits(wrong)


@pytest.mark.parametrize("wrong", [0, 5, -1])
def test_few_bits_that_are_too_few_or_too_many_are_told_the_range(wrong: int) -> None:
    for call in (invact.plan, invact.patch, approximate_everywhere):
        with pytest.raises(ValueError, match=f"few_bits is {wrong}, but .* in 1 to 4 bits"):
            call(nn.GELU(), (torch.randn(8),), few_bits=wrong)


def test_exact_and_approximate_gradients_are_not_to_be_had_together() -> None:
    model, inputs = nn.Sequential(nn.Linear(8, 8), nn.GELU()), (torch.randn(4, 8),)
    for call in (invact.plan, invact.patch, decide_for_device):
        with pytest.raises(ValueError, match=r"exact=True asks for.*Leave one of them out"):
            call(model, inputs, exact=True, few_bits=2)
    with (
        pytest.raises(ValueError, match="Leave one of them out"),
        invact.patched(model, inputs, exact=True, few_bits=2),
    ):
        pass


# --- models -------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """Two layers, the second frozen, as when adapters train the first: nobody keeps the activation's output."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 256), act or nn.GELU(), nn.Linear(256, 16)
        self.out = nn.Linear(16, 4)
        self.down.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.down(self.act(self.up(x))))
        return y


class Written(Adapted):
    """The same with the activation in the method."""

    def __init__(self) -> None:
        super().__init__()
        del self.act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.down(F.gelu(self.up(x))))
        return y


X = (torch.randn(64, 16),)
ELEMENTS = 64 * 256


@EVERY_NUMBER_OF_BITS
@pytest.mark.parametrize("kind", [Adapted, Written])
def test_before_a_frozen_layer_bits_are_kept_instead_of_the_input(kind: type[Adapted], bits: int) -> None:
    model = kind()
    before = kept_bytes(model, X)
    report = invact.patch(model, X, few_bits=bits)
    (site,) = report.sites
    assert site.action == "approximate"
    assert report.approximate == [site]
    assert site.reason == (
        f"approximate: its derivative in steps of {1 << bits} values (FewBit, arXiv 2202.00441); nobody else keeps its "
        "output"
    )
    assert site.bytes_saved == 4 * ELEMENTS - bits * ELEMENTS // 8
    assert (report.bytes_before, report.bytes_after) == (before, kept_bytes(model, X))
    assert report.bytes_before - report.bytes_after == site.bytes_saved


@pytest.mark.parametrize("kind", [Adapted, Written])
def test_the_gradient_is_the_steps_and_unpatch_brings_stocks_back(kind: type[Adapted]) -> None:
    torch.manual_seed(0)
    model = kind()

    def gradient() -> Tensor:
        model.zero_grad(set_to_none=True)
        model(*X).square().sum().backward()
        assert model.up.weight.grad is not None
        return model.up.weight.grad

    outputs, stock = model(*X), gradient()
    invact.patch(model, X, few_bits=4)
    assert torch.equal(model(*X), outputs)
    approximate = gradient()
    assert 1e-5 < (approximate - stock).norm() / stock.norm() < 0.1
    (site,) = invact.plan(model, X).sites
    assert (site.action, site.reason) == ("keep", "already approximate by an earlier patch")
    assert invact.unpatch(model) == 1
    assert torch.equal(gradient(), stock)


@pytest.mark.parametrize("kind", [Adapted, Written, *CASES])
def test_nothing_is_approximate_unless_somebody_asks(kind: type[nn.Module]) -> None:
    inputs = X if issubclass(kind, Adapted) else (torch.randn(2, 4, 16),)
    for exact in (False, True):
        report = invact.plan(kind(), inputs, exact=exact)
        assert not report.approximate
        assert "approximate" not in str(report)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_is_saved_is_counted_and_never_less_than_without(case: type[nn.Module]) -> None:
    model, inputs = case(), (torch.randn(64, 4, 16),)
    without = invact.plan(model, inputs)
    report = invact.patch(model, inputs, few_bits=3)
    said = sum(site.bytes_saved for site in report.sites) + sum(tensor.bytes_saved for tensor in report.derived)
    assert report.bytes_before - report.bytes_after == said
    assert report.bytes_after == kept_bytes(model, inputs)
    assert report.bytes_after == without.bytes_after - sum(site.bytes_saved for site in report.approximate)
    assert all(site.action != "approximate" for site in report.sites) or report.bytes_after < without.bytes_after
    # Where inverting or deriving pays, it stays.
    changed = [(a, b) for a, b in zip(without.sites, report.sites, strict=True) if a != b]
    assert all((a.action, b.action) == ("keep", "approximate") for a, b in changed)


def test_an_input_that_others_are_made_again_from_stays() -> None:
    (site,) = invact.plan(DroppedAndShared(), (torch.randn(64, 4, 16),), few_bits=1).sites
    assert (site.action, site.reason.partition(":")[0]) == ("keep", "nobody else keeps its output")


def test_a_site_left_out_by_exclude_is_kept() -> None:
    report = invact.plan(Adapted(), X, few_bits=2, exclude="act")
    assert [site.action for site in report.sites] == ["keep"]


def test_changed_settings_a_hook_and_evaluation_run_the_stock_code() -> None:
    model = Adapted(nn.LeakyReLU(0.1))
    invact.patch(model, X, few_bits=1)
    model.act.negative_slope = 0.7
    stock = copy.deepcopy(model)
    assert invact.unpatch(stock) == 1
    for each in (model, stock):
        each(*X).sum().backward()
    assert torch.equal(model.up.weight.grad, stock.up.weight.grad)
    with torch.no_grad():
        assert model.act(torch.randn(4)).grad_fn is None


def test_a_patched_module_is_pickled_as_stock_and_copied_as_it_is() -> None:
    model = Adapted()
    invact.patch(model, X, few_bits=2)
    assert type(pickle.loads(pickle.dumps(model)).act) is nn.GELU
    assert kept_bytes(copy.deepcopy(model), X) == kept_bytes(model, X)
    assert type(model.act).__name__ == "GELU"
    assert isinstance(model.act, nn.GELU)


def test_an_activation_in_place_stays_in_place() -> None:
    model = Adapted(nn.SiLU(inplace=True))
    outputs = model(*X)
    report = invact.patch(model, X, few_bits=3)
    assert [site.action for site in report.sites] == ["approximate"]
    assert torch.equal(model(*X), outputs)
    assert report.bytes_after == kept_bytes(model, X)
    x = torch.randn(8, requires_grad=True) * 1
    assert model.act(x) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_count_is_right_too(dtype: torch.dtype) -> None:
    model = Adapted()
    report = invact.patch(model, X, autocast=dtype, few_bits=3)
    assert [site.bytes_saved for site in report.sites] == [2 * ELEMENTS - 3 * ELEMENTS // 8]
    with torch.autocast("cpu", dtype):
        model(*X).sum().backward()
    assert model.up.weight.grad is not None


def test_a_compiled_model_trains_with_the_same_steps() -> None:
    torch._dynamo.reset()
    model = Adapted()
    invact.patch(model, X, few_bits=2)
    model(*X).sum().backward()
    eager = model.up.weight.grad
    model.zero_grad(set_to_none=True)
    torch.compile(model)(*X).sum().backward()
    assert torch.allclose(model.up.weight.grad, eager, atol=1e-5)


def test_a_dry_run_for_a_gpu_counts_them_without_one() -> None:
    with torch.device("meta"):
        model = Adapted().bfloat16()
        inputs = (torch.randn(64, 16, dtype=torch.bfloat16),)
    report = decide_for_device(model, inputs, few_bits=1).report
    assert [site.bytes_saved for site in report.sites] == [2 * ELEMENTS - ELEMENTS // 8]
    assert report.bytes_before - report.bytes_after == report.sites[0].bytes_saved


def test_the_report_says_approximate_wherever_it_speaks_of_it() -> None:
    report = invact.plan(Adapted(), X, few_bits=3)
    text = " ".join(str(report).split())
    assert "training on cpu, few_bits=3, approximate where nothing exact helps" in text
    assert "the gradients through 1 of 1 sites are approximate, as few_bits=3 asks for: each is one of 8 slopes" in text
    assert "below it, since some derivatives are approximate" in text
    assert report.bytes_floor == invact.plan(Adapted(), X).bytes_floor > report.bytes_after
    (site,) = json.loads(report.to_json())["sites"]
    assert site["action"] == "approximate"
    assert "58.0 KiB" in text  # what the site saves, in its own row
    pytest.importorskip("jinja2")
    from invact.pages.page import plan_page

    page = plan_page(report, [], "invact patch").html()
    assert "approximate: its derivative in steps of 8 values" in page
    assert "58.0 KiB" in page


def test_everywhere_it_takes_the_place_of_inverting_and_deriving() -> None:
    model = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 256), nn.ReLU(), nn.SiLU())
    report = approximate_everywhere(model, X, few_bits=2)
    assert [site.action for site in report.sites] == ["approximate", "keep", "approximate"]
    assert report.sites[0].reason.endswith("; asked for at every site")
    assert not report.derived
    assert report.bytes_after == kept_bytes(model, X)
    assert report.bytes_before - report.bytes_after == sum(site.bytes_saved for site in report.sites)
    # The second site's input is the ReLU's output, which that keeps anyway: its codes come on top.
    assert [site.bytes_saved for site in report.sites] == [4 * ELEMENTS - ELEMENTS // 4, 0, -ELEMENTS // 4]
    assert invact.unpatch(model) == 2


def test_a_gated_model_is_approximate_everywhere_too() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
            return y

    model = Gated()
    report = approximate_everywhere(model, X, few_bits=1)
    assert [site.action for site in report.sites] == ["approximate"]
    assert report.bytes_after == kept_bytes(model, X) == report.bytes_before - 64 * 64 * 4 + 64 * 64 // 8


def test_the_command_takes_the_bits_and_refuses_them_beside_exact() -> None:
    arguments = ["patch", "bert-base-uncased", "--batch-size", "1", "--seq-len", "8"]
    done = CliRunner().invoke(app, [*arguments, "--few-bits", "3", "--json"])
    assert done.exit_code == 0, done.output
    assert "few_bits=3, approximate" in json.loads(done.stdout)["setting"]
    refused = CliRunner().invoke(app, [*arguments, "--few-bits", "3", "--exact"])
    assert refused.exit_code == 2
    assert "Leave one of them out." in refused.output
    assert CliRunner().invoke(app, [*arguments, "--few-bits", "5"]).exit_code == 2


@pytest.mark.parametrize("module", [few_bits_module, steps_module, patching], ids=lambda module: module.__name__)
def test_the_examples_run(module: Any) -> None:
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted
    assert not result.failed
