"""Approximate derivatives in models: only where somebody asks for them, k bits kept an element, and said everywhere."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from conftest import kept_bytes
from decision_cases import CASES, DroppedAndShared
from steps_apart import EVERY_NUMBER_OF_BITS
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import invact
from invact.cli import app
from invact.errors.checks import check_few_bits
from invact.planning.plans import decide_for_device
from invact.trial.fewbit import approximate_everywhere

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
