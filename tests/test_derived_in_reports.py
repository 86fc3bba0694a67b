"""What is made again instead of being kept is told: by whom it was wanted, where it is made, and what that costs."""

from __future__ import annotations

import copy
import json
from fnmatch import fnmatchcase

import pytest
import torch
import torch.nn.functional as F
from small_models import small_model
from torch import nn

import invact
from invact.planning.plans import decide_for_device
from invact.report.records import Site
from invact.report.report import Report

TOKENS, WIDTH, WIDE = 64, 32, 64
ROW = TOKENS * WIDTH * 4


class SteppedNorm(nn.Module):
    """RMSNorm as Hugging Face writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, WIDE), nn.Linear(WIDTH, WIDE)
        self.down_proj = nn.Linear(WIDE, WIDTH)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, norm=nn.LayerNorm) -> None:
        super().__init__()
        self.norm, self.mlp, self.dropout = norm(WIDTH), Gated(), nn.Dropout(0.1)

    def forward(self, x):
        return x + self.dropout(self.mlp(self.norm(x)))


def blocks(norm=nn.LayerNorm, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(norm), Block(norm), nn.Linear(WIDTH, WIDTH)).to(dtype)


def tokens(dtype=torch.float32):
    return (torch.randn(TOKENS, WIDTH, dtype=dtype),)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, SteppedNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_sites_and_derived_tensors_save_is_what_the_model_keeps_less(norm, dtype, exact):
    report = invact.plan(blocks(norm, dtype), tokens(dtype), exact=exact)
    told = sum(site.bytes_saved for site in report.sites) + sum(tensor.bytes_saved for tensor in report.derived)
    assert told == pytest.approx(report.bytes_before - report.bytes_after, rel=0.02)
    assert report.bytes_floor <= report.bytes_after
    assert sum(report.remains.values()) == report.bytes_after


@pytest.mark.parametrize("norm", [nn.LayerNorm, SteppedNorm])
def test_who_makes_and_who_wanted_it_are_modules_and_backward_moves_something(norm):
    model = blocks(norm, torch.bfloat16)
    modules = dict(model.named_modules())
    derived = invact.plan(model, tokens(torch.bfloat16)).derived
    assert derived
    for tensor in derived:
        assert tensor.path in modules
        assert tensor.kept_by in modules
        assert tensor.bytes_saved > 0
        assert tensor.bytes_moved > 0
        assert tensor.keepers >= 1


def test_an_output_is_called_by_the_class_of_its_module():
    derived = {(each.path, each.what): each for each in invact.plan(blocks(SteppedNorm), tokens()).derived}
    norm = derived["1.norm", "SteppedNorm's output"]
    assert (norm.kept_by, norm.keepers) == ("1.mlp.gate_proj", 2)
    assert norm.bytes_saved == ROW
    product = derived["1.mlp", "a product in Gated"]
    assert product.kept_by == "1.mlp.down_proj"
    # The activation itself, of so few elements, is made again on the way.
    assert product.reason == "made again from gate_proj's output and up_proj's output, in 2 steps"
    assert product.bytes_moved >= 3 * TOKENS * WIDE * 4  # two are read and one is written


def test_a_module_that_hands_on_its_input_has_made_nothing():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Identity(), nn.Linear(WIDTH, WIDTH))
    (tensor,) = invact.plan(model, tokens()).derived
    assert (tensor.what, tensor.path, tensor.kept_by) == ("LayerNorm's output", "1", "3")
    assert tensor.reason == "made again from Linear's output"


def test_a_wide_copy_is_told_as_the_narrow_one_that_is_kept():
    model = blocks(SteppedNorm, torch.bfloat16)
    copy = next(each for each in invact.plan(model, tokens(torch.bfloat16)).derived if "float32 copy" in each.what)
    assert copy.path.endswith("norm")
    assert copy.bytes_saved in (ROW, ROW // 2)  # what it is a copy of is kept anyway, or in its stead


def test_a_mask_is_told_as_kept_in_bits():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), Masked(), nn.Linear(WIDTH, WIDTH))
    (mask,) = [each for each in invact.plan(model, tokens()).derived if "mask" in each.what]
    assert (mask.what, mask.path) == ("a mask in Masked", "2")
    assert mask.reason == "kept in bits instead of bytes"
    assert mask.bytes_saved == TOKENS * WIDTH * 7 // 8


def test_a_dropped_tensor_is_told_as_made_from_a_mask_that_is_read_in_bits():
    class Dropped(nn.Module):
        def forward(self, x):
            return torch.native_dropout(x, 0.1, True)[0]

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), Dropped(), nn.Linear(WIDTH, WIDTH))
    (dropped,) = [each for each in invact.plan(model, tokens()).derived if each.what == "Dropped's output"]
    assert dropped.reason == "made again from ReLU's output and a mask"
    assert dropped.bytes_moved == 2 * TOKENS * WIDTH * 4 + TOKENS * WIDTH // 8


class Masked(nn.Module):
    def forward(self, x):
        return x.masked_fill(x > 1, 0.0)


def test_what_several_recipes_share_is_moved_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.one, self.two, self.three = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            x = self.norm(self.one(x))
            return self.two(F.relu(x).neg()) + self.three(x.sigmoid().neg())

    report = invact.plan(Shared(), tokens(), exact=True)
    negated = [each for each in report.derived if each.what == "a product in Shared" or "neg" in each.what]
    assert len(negated) == 2
    assert all(each.bytes_moved in (2 * ROW, 4 * ROW, 6 * ROW) for each in negated)
    assert (
        sum(each.bytes_moved for each in report.derived) <= 5 * 2 * ROW + 2 * WIDTH * 4
    )  # five operators, each once, and the norm's weights


@pytest.mark.parametrize("pattern", ["1*", "*norm", "1.mlp*", "*.down_proj", "*act"])
def test_what_is_excluded_neither_makes_nor_wants_anything(pattern):
    report = invact.plan(blocks(), tokens(), exclude=pattern)
    assert report.derived
    assert not [
        each for each in report.derived if fnmatchcase(each.path, pattern) or fnmatchcase(each.kept_by, pattern)
    ]


@pytest.mark.parametrize("pattern", ["1*", "1.mlp*"])
def test_only_what_is_included_makes_or_wants_anything(pattern):
    report = invact.plan(blocks(), tokens(), include=pattern)
    assert report.derived
    assert all(fnmatchcase(each.path, pattern) and fnmatchcase(each.kept_by, pattern) for each in report.derived)


def test_planning_changes_nothing_and_unpatching_takes_all_back(count_kept):
    model, (x,) = blocks(), tokens()
    before = count_kept(model, (x,))
    report = invact.plan(model, (x,))
    assert count_kept(model, (x,)) == before == report.bytes_before
    invact.patch(model, (x,))
    assert count_kept(model, (x,)) == pytest.approx(report.bytes_after, rel=0.01)
    invact.unpatch(model)
    assert count_kept(model, (x,)) == before


def test_dict_and_json_tell_all_of_it():
    report = invact.plan(blocks(), tokens())
    told = json.loads(report.to_json())
    assert told == report.to_dict()
    assert [each["what"] for each in told["derived"]] == [each.what for each in report.derived]
    assert told["bytes_floor"] == report.bytes_floor
    assert (told["remains"], told["not_derived"]) == (report.remains, report.not_derived)


def test_the_text_tells_the_kinds_those_first_that_save_most_and_the_floor():
    report = invact.plan(blocks(), tokens())
    saved = [sum(each.bytes_saved for each in kind) for kind in report.derived_kinds()]
    assert saved == sorted(saved, reverse=True)
    assert sum(saved) == sum(each.bytes_saved for each in report.derived)
    text = " ".join(str(report).split())
    assert "wanted by" in text
    assert "a product in Gated" in text
    assert f"The floor is {report.bytes_floor / 1024:.1f} KiB" in text
    assert "matrix products" in text


@pytest.mark.parametrize(
    ("forward", "told"),
    [
        (lambda m, x: m.two(torch.special.i0(m.one(x))), "i0: there is no recipe for that operator"),
        (lambda m, x: m.two(F.gelu(m.one(x)).add_(1.0)), "changed in place"),
    ],
)
def test_what_is_kept_though_it_could_be_made_again_is_told_with_the_reason(forward, told):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return forward(self, x)

    report = invact.plan(Two(), tokens())
    assert report.bytes_after > 1.08 * report.bytes_floor
    assert any(told in reason for reason in report.not_derived)
    assert told in " ".join(str(report).split())


def test_a_residual_sum_of_which_the_summands_are_kept_counts_not_to_the_floor():
    class Added(nn.Module):
        """As in a ResNet: what every sum adds is kept by the norms before it."""

        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(4))
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))

        def forward(self, x):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = F.relu(x + norm(conv(x)))
            return x

    report = invact.plan(Added(), (torch.randn(4, 8, 16, 16),))
    assert 0 < report.bytes_floor <= report.bytes_after


def test_an_expression_whose_output_is_made_again_says_so():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)

        def forward(self, x):
            return self.two(F.gelu(self.one(x)))

    report = invact.plan(nn.Sequential(Written()), tokens())
    (site,) = report.sites
    assert (site.path, site.action, site.bytes_saved) == ("0.forward:gelu", "derive", 0)
    assert site.reason.startswith("its output is made again from its input: ")
    assert [(each.path, each.kept_by) for each in report.derived] == [("0", "0.two")]


def test_a_layer_of_transformers_is_checkpointed_as_before_when_hooks_stand_in_it(count_kept):
    model = small_model("BertModel", num_attention_heads=2, vocab_size=64).train()
    inputs = {"input_ids": torch.zeros(2, 64, dtype=torch.long)}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    stock = count_kept(model, inputs)
    report = invact.patch(model, inputs)
    assert report.bytes_before == pytest.approx(stock, rel=0.01)
    assert count_kept(model, inputs) <= stock
    assert "2 checkpointed regions" in " ".join(report.notes)


def test_a_plan_at_the_floor_says_so():
    site = Site("act", "gelu", "GELU", "invert", "")
    report = Report([site], bytes_before=200, bytes_after=100, bytes_floor=100, remains={"matrix products": 100})
    assert "this plan is there" in str(report)
    assert "Kept though" not in str(report)


@pytest.mark.parametrize(
    ("rows", "words", "bits"),
    [
        (8, "; fewer than 16,384 elements, as here, are made again instead", 0),
        (128, "", 128 * 256 // 8),
        (2048, "; more than 262,144 elements, as here, are made again on a CPU instead", 0),
    ],
)
def test_a_site_of_few_elements_or_of_many_on_a_cpu_is_made_again_and_says_so(rows, words, bits, count_kept):
    stock, x = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), torch.randn(rows, 64)
    ours = copy.deepcopy(stock)
    before = count_kept(stock, (x,))
    report = invact.patch(ours, (x,))
    (site,) = report.sites
    assert (site.action, site.reason) == ("invert", "Linear keeps its output anyway, so its input can go" + words)
    assert site.bytes_saved == before - count_kept(ours, (x,)) == rows * 256 * 4 - bits
    for model in (stock, ours):
        model(x).square().sum().backward()
    alike = [torch.equal(a.grad, b.grad) for a, b in zip(stock.parameters(), ours.parameters(), strict=True)]
    assert all(alike) == (not bits)


def test_a_plan_for_a_gpu_inverts_however_many_elements_there_are():
    model, x = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), torch.randn(2048, 64)
    (site,) = decide_for_device(model, (x,)).report.sites
    assert site.reason == "Linear keeps its output anyway, so its input can go"
    assert site.bytes_saved == 2048 * 256 * 4 - 2048 * 256 // 8
