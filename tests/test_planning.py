"""What is decided at a site follows from what autograd keeps, and planning leaves no trace."""

import copy
import random
import time

import pytest
import torch
import torch.nn.functional as F
from small_models import small_model
from torch import nn

import invact
from invact.planning.plans import decide


def plan_one(*layers, x=None, **options):
    """The one two-sided activation of a small sequential model."""
    report = invact.plan(nn.Sequential(*layers), (torch.randn(4, 16) if x is None else x,), **options)
    (site,) = (site for site in report.sites if site.activation in ("gelu", "silu", "gelu_tanh", "quick_gelu"))
    return site, report


def test_a_linear_next_keeps_the_output_so_the_input_need_not_be_kept():
    site, report = plan_one(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    assert (site.path, site.activation, site.module_class, site.action) == ("1", "gelu", "GELU", "invert")
    assert site.reason == "Linear keeps its output anyway, so its input can go"
    assert site.bytes_saved == 4 * 64 * 4 - 4 * 64 // 8
    assert report.bytes_before - report.bytes_after == site.bytes_saved


def test_a_frozen_linear_next_keeps_nothing_so_the_activation_is_kept():
    site, report = plan_one(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16).requires_grad_(False))
    assert site.action == "keep"
    assert "nobody else keeps its output" in site.reason
    assert report.saving == 0


def test_an_activation_before_which_everything_is_frozen_needs_no_gradient():
    site, _ = plan_one(nn.Linear(16, 64).requires_grad_(False), nn.GELU(), nn.Linear(64, 16))
    assert site.reason == "no gradient flows through it here"


def test_in_front_of_a_dropout_which_keeps_a_mask_alone_it_is_kept():
    site, report = plan_one(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16))
    assert (site.action, site.bytes_saved) == ("keep", 0)
    assert site.reason.startswith("nobody else keeps its output")
    assert report.bytes_before == report.bytes_after


def test_a_norm_next_keeps_the_output():
    site, _ = plan_one(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64))
    assert site.action == "invert"
    assert site.reason.startswith("LayerNorm keeps")


def test_an_input_kept_by_somebody_else_is_not_freed():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.act = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(64, 16), nn.GELU()

        def forward(self, x):
            x = self.a(x)
            return self.b(self.act(x)) + self.c(x)

    site, _ = plan_one(Both())
    assert site.action == "keep"
    assert site.reason == "Linear keeps its input anyway"


def test_an_output_changed_in_place_later_is_kept():
    class Scales(nn.Module):
        def forward(self, x):
            return x.mul_(2.0)

    site, _ = plan_one(nn.Linear(16, 64), nn.GELU(), Scales(), nn.Linear(64, 16))
    assert site.reason == "its output is changed in place later"


def test_exact_inverts_nothing_and_is_said(run_backward):
    model, x = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), torch.randn(4, 16)
    _, expected = run_backward(model, (x,))
    report = invact.patch(model, (x,), exact=True)
    assert [(site.action, site.reason) for site in report.sites] == [("keep", "exact gradients are asked for")]
    assert "exact" in report.setting
    assert "exact" not in invact.plan(model, (x,)).setting
    _, gradients = run_backward(model, (x,))
    assert torch.equal(gradients, expected)


def test_relu_sigmoid_and_tanh_are_reported_and_kept():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Tanh())
    report = invact.plan(model, (torch.randn(4, 16),))
    assert [site.activation for site in report.sites] == ["relu", "sigmoid", "tanh"]
    assert {site.reason for site in report.sites} == {"stock PyTorch already keeps only its output"}


def test_an_activation_of_several_steps_pays_even_where_nobody_else_keeps_its_output():
    class Steps(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    site, _ = plan_one(nn.Linear(16, 64), Steps(), nn.Linear(64, 16).requires_grad_(False))
    assert site.action == "invert"
    assert site.bytes_saved == 4 * 64 * 4 - 4 * 64 // 8


def test_an_activation_used_twice_is_one_site_with_the_bytes_of_both_calls():
    act = nn.GELU()
    model = nn.Sequential(nn.Linear(16, 64), act, nn.Linear(64, 64), act, nn.Linear(64, 16))
    report = invact.patch(model, (torch.randn(4, 16),))
    (site,) = report.sites
    assert (site.path, site.bytes_saved) == ("1", 2 * (4 * 64 * 4 - 4 * 64 // 8))
    assert model[1] is model[3]
    assert invact.unpatch(model) == 1
    assert model[1] is act
    assert model[3] is act


def test_two_activations_of_one_input_are_not_both_counted_as_freeing_it(count_kept):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(64, 16)
            self.gelu, self.silu = nn.GELU(), nn.SiLU()

        def forward(self, x):
            x = self.a(x)
            return self.b(self.gelu(x)) + self.c(self.silu(x))

    model, x = Pair(), torch.randn(4, 16)
    report = invact.patch(model, (x,))
    assert report.bytes_after == count_kept(model, (x,))
    assert report.bytes_after <= report.bytes_before


def test_a_gated_product_keeps_the_output():
    class SwiGLU(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down, self.act = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 16), nn.SiLU()

        def forward(self, x):
            return self.down(self.act(self.gate(x)) * self.up(x))

    site, _ = plan_one(SwiGLU())
    assert (site.action, site.reason) == ("invert", "SwiGLU keeps its output anyway, so its input can go")


def test_under_autocast_the_cast_output_counts_as_the_output():
    class Powers(nn.Module):
        """torch.pow runs in fp32 under autocast, so this activation's own output is fp32."""

        def forward(self, x):
            return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))

    model = nn.Sequential(nn.Linear(16, 64), Powers(), nn.Linear(64, 16))
    report = invact.plan(model, (torch.randn(4, 16),), autocast=torch.bfloat16)
    assert report.sites[0].action == "invert"
    assert report.sites[0].bytes_saved == report.bytes_before - report.bytes_after


@pytest.mark.parametrize("shape", [(4, 6, 16), (4, 6, 5, 16), (4, 6, 5, 3, 16), (4, 16)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_a_batch_norm_of_a_transposed_input_is_laid_out_as_on_real_tensors(shape, training, count_kept):
    class LastDimension(nn.Module):
        """Normalises over the last dimension, as PatchTST does; whether the Linear has to copy depends on strides."""

        def __init__(self):
            super().__init__()
            kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
            self.norm, self.a, self.act, self.b = kind(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)

        def forward(self, x):
            x = self.norm(x.transpose(1, -1)).transpose(1, -1)
            return self.b(self.act(self.a(x))) + x.flatten().square().mean()

    model, x = LastDimension(), torch.randn(shape)
    if len(shape) == 2:
        x = x.t().contiguous().t()
    model.norm.train(training)
    kept = count_kept(model, (x,))
    report = invact.patch(model, (x,))
    assert (report.bytes_before, report.bytes_after) == (kept, count_kept(model, (x,)))


def test_what_the_fused_lstm_of_the_cpu_keeps_for_itself_is_counted(count_kept):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.act, self.out = nn.LSTM(16, 32, batch_first=True), nn.GELU(), nn.Linear(32, 16)

        def forward(self, x):
            return self.out(self.act(self.lstm(x)[0]))

    model, x = Reads(), torch.randn(1, 10, 16)
    kept = count_kept(model, (x,))
    report = invact.patch(model, (x,))
    assert (report.bytes_before, report.bytes_after) == (kept, count_kept(model, (x,)))


def test_checkpointed_regions_are_planned_as_if_they_were_not_and_counted_as_they_are(run_backward):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 50}
    inputs = {"input_ids": torch.randint(0, 50, (2, 16))}
    for reentrant in (True, False):
        model = small_model("BertForMaskedLM", **sizes).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        before = run_backward(model, inputs)
        report = invact.patch(model, inputs)
        assert report.bytes_after < report.bytes_before
        assert any("checkpointed regions" in note for note in report.notes)
        after = run_backward(model, inputs)
        torch.testing.assert_close(after[0], before[0], rtol=1e-5, atol=1e-5)
        assert (after[1] - before[1]).norm() < 1e-4 * before[1].norm()


def test_a_branch_that_the_model_drops_is_not_counted(count_kept):
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.act, self.out = nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)

        def forward(self, x):
            h = self.lin(x)
            self.out(self.act(h))
            return h * 0.5

    report = invact.plan(Drops(), (torch.randn(4, 16),))
    assert report.bytes_before == 4 * 16 * 4
    assert report.sites[0].reason == "it keeps nothing here"


def test_include_and_exclude_choose_sites_by_path():
    model = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.GELU())], nn.Linear(16, 16))
    x = (torch.randn(4, 16),)
    assert [s.path for s in invact.plan(model, x, include="[13]").inverted] == ["1", "3"]
    assert [s.path for s in invact.plan(model, x, exclude=["1", "5"]).inverted] == ["3"]
    assert invact.plan(model, x, include="typo*").notes == [
        "include and exclude leave no site: they are glob patterns over the paths of the sites."
    ]


def test_the_report_is_the_same_as_dict_json_and_text():
    import json

    _, report = plan_one(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    told = json.loads(report.to_json())
    assert told == report.to_dict()
    assert told["bytes_before"] - told["bytes_after"] == told["sites"][0]["bytes_saved"]
    assert told["saving"] == pytest.approx(report.saving)
    assert "gelu" in str(report)
    assert f"{report.saving:.1%} saved" in str(report)


class Fussy(nn.Module):
    """Everything that a forward pass may leave behind."""

    def __init__(self, branch=False):
        super().__init__()
        self.a, self.norm, self.act, self.b = nn.Linear(16, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 16)
        self.drop = nn.Dropout(0.5)
        self.norm2 = nn.BatchNorm1d(16).eval()
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.cache, self.history, self.branch = 0, None, [], branch

    def forward(self, x):
        self.calls += 1
        self.cache = x
        self.history.append(x)
        self.seen += 1
        random.random()
        if self.branch and x.sum().item() > 1e9:
            return x
        return self.norm2(self.drop(self.b(self.act(self.norm(self.a(x))))))


@pytest.mark.parametrize("branch", [False, True], ids=["on fake tensors", "on real tensors"])
def test_planning_leaves_no_trace(branch):
    model = Fussy(branch)
    model.a.weight.grad = torch.ones_like(model.a.weight)
    saved = copy.deepcopy(model.state_dict())
    addresses = [t.data_ptr() for t in [*model.parameters(), *model.buffers()]]
    flags = [m.training for m in model.modules()]
    torch.manual_seed(1), random.seed(1)
    expected = torch.rand(1), random.random()
    torch.manual_seed(1), random.seed(1)
    report = invact.plan(model, (torch.randn(8, 16, generator=torch.Generator().manual_seed(0)),))
    assert (torch.rand(1), random.random()) == expected
    assert ("real forward" in " ".join(report.notes)) == branch
    assert len(report.inverted) == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    assert [t.data_ptr() for t in [*model.parameters(), *model.buffers()]] == addresses
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(model.a.weight.grad, torch.ones_like(model.a.weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "a.weight")
    assert (model.calls, model.cache, model.history) == (0, None, [])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Endless(Fussy):
    """Never comes back; `catches` its errors, too."""

    def __init__(self, branch=False, catches=False):
        super().__init__(branch)
        self.catches = catches

    def forward(self, x):
        x = super().forward(x)
        try:
            while True:
                x = x + 1
        except TimeoutError:
            if not self.catches:
                raise
        return x


@pytest.mark.parametrize("catches", [False, True], ids=["", "catching errors"])
@pytest.mark.parametrize("branch", [False, True], ids=["on fake tensors", "on real tensors"])
def test_a_forward_that_does_not_end_is_stopped_and_the_model_is_as_it_was(branch, catches, monkeypatch):
    monkeypatch.setattr("invact.probing.TIME_LIMIT", 0.5)
    model = Endless(branch, catches)
    saved = copy.deepcopy(model.state_dict())
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"had not ended after 0.5 s.*was put back.*Pass smaller example_inputs"):
        invact.patch(model, (torch.randn(8, 16),))
    assert time.monotonic() - began < 10
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert (model.calls, model.cache, model.history) == (0, None, [])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert isinstance(model.act, nn.GELU)
    assert len(invact.plan(Fussy(branch), (torch.randn(8, 16),)).inverted) == 1  # the next one has its own time


def test_a_model_in_evaluation_mode_is_planned_for_training_and_stays_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).eval()
    assert len(invact.plan(model, (torch.randn(4, 16),)).inverted) == 1
    assert not any(m.training for m in model.modules())


def test_planning_for_a_gpu_needs_none_and_counts_attention_as_asked():
    from invact.planning.plans import decide_for_device

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.up, self.act, self.down = nn.Linear(64, 192), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x):
            x, _ = self.attention(x, x, x, need_weights=False)
            q, k, v = self.qkv(x).view(2, 128, 3, 4, 16).permute(2, 0, 3, 1, 4)
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 128, 64)
            return self.down(self.act(self.up(x)))

    x = (torch.randn(2, 128, 64),)
    matrix = 2 * 4 * 128 * 128 * 4
    fused = decide_for_device(Attends(), x, device="cuda").report
    math = decide_for_device(Attends(), x, device="cuda", attention="math").report
    assert math.bytes_before - fused.bytes_before > 2 * matrix
    assert [s.action for s in fused.sites] == [s.action for s in math.sites] == ["invert"]


class CallsFunctional(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


@pytest.mark.slow
@pytest.mark.parametrize("written", [False, True], ids=["modules", "expressions"])
def test_a_model_of_a_thousand_sites_is_planned_in_under_20_seconds_and_patched_in_under_one(written):
    blocks = [CallsFunctional() if written else nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(1000)]
    model = nn.Sequential(*blocks, nn.Linear(16, 16))
    began = time.process_time()
    decided = decide(model, (torch.randn(4, 16),))
    planned = time.process_time()
    decided.apply(model)
    patched = time.process_time()
    assert len(decided.report.inverted) == 1000
    assert planned - began < 20
    assert patched - planned < 1
    assert invact.unpatch(model) == 1000
