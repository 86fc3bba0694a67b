"""What a report counts is what is kept when the model is trained as it is, wherever it is and whatever hangs on it."""

import tempfile
import threading

import pytest
import torch
from small_models import small_model
from torch import nn

import invact
from invact.planning.plans import decide_for_device

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


def block(*, dropout=0.0):
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(dropout), nn.Linear(64, 32))


def as_counted(count_kept, model, inputs=(X,), **options):
    """The report of patching, held against counts on real tensors and against itself."""
    before = count_kept(model, inputs)
    report = invact.patch(model, inputs, **options)
    assert (report.bytes_before, report.bytes_after) == (before, count_kept(model, inputs))
    saved = sum(site.bytes_saved for site in report.inverted) + sum(tensor.bytes_saved for tensor in report.derived)
    assert saved == report.bytes_before - report.bytes_after
    return report


class Shared(nn.Module):
    """One activation that is given tensors of several sizes."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(16, 64), nn.Linear(64, 16), nn.GELU()

    def forward(self, *inputs):
        return sum(self.down(self.act(self.up(x))).mean() for x in inputs)


@pytest.mark.parametrize("rows", [(1024, 64), (8192, 1024), (8192, 1024, 64)], ids=str)
def test_of_a_site_that_is_inverted_in_some_calls_and_derived_in_others_all_is_counted(count_kept, rows):
    report = as_counted(count_kept, Shared(), tuple(torch.randn(n, 16) for n in rows))
    (site,) = report.sites
    assert site.action == "invert"
    assert ("fewer than 16,384 elements" in site.reason) == (64 in rows)
    assert ("more than 262,144 elements" in site.reason) == (8192 in rows)


def test_dropout_in_place_is_no_kernel_on_a_gpu_either_and_keeps_as_much_there():
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1, inplace=True), nn.Linear(64, 16))
    inputs = (torch.randn(512, 16),)
    here, on_gpu = (decide_for_device(model, inputs, device=device).report for device in ("cpu", "cuda"))
    assert [site.reason for site in here.sites] == ["its output is changed in place later"]
    assert [site.reason for site in on_gpu.sites] == ["its output is changed in place later"]
    assert here.bytes_before == on_gpu.bytes_before


# --- modes --------------------------------------------------------------------------------------------


def bert():
    model = small_model("BertForSequenceClassification", num_attention_heads=2)
    return model, {"input_ids": torch.arange(32).view(2, 16), "labels": torch.tensor([0, 1])}


def vit():
    model = small_model("ViTForImageClassification", num_attention_heads=2)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}


@pytest.mark.parametrize("make", [bert, vit])
def test_a_model_as_from_pretrained_gives_it_is_counted_as_it_is_trained(make, count_kept, tmp_path):
    model, inputs = make()
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    assert not model.training
    report = as_counted(count_kept, model, inputs)
    assert len(report.inverted) == 2
    assert any("evaluation mode" in note for note in report.notes)


def test_parts_in_evaluation_mode_are_counted_so(count_kept):
    norms = [nn.BatchNorm1d(64), nn.BatchNorm1d(64).eval()]
    drops = [nn.Dropout(0.5), nn.Dropout(0.5).eval()]
    layers = [
        layer for norm in norms for drop in drops for layer in (nn.Linear(64, 64), nn.GELU(), drop, norm, nn.SiLU())
    ]
    model = nn.Sequential(nn.Linear(32, 64), *layers, nn.Linear(64, 2))
    report = as_counted(count_kept, model)
    assert {site.action for site in report.sites} == {"invert", "keep"}


@pytest.mark.parametrize("do", [invact.plan, invact.patch, invact.activation_memory])
def test_inside_inference_mode_one_sentence_says_so(do):
    model = block()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"planned inside torch\.inference_mode.*Leave that"):
        do(model, (X,))
    with torch.inference_mode():
        model = block()
    with pytest.raises(ValueError, match=r"`0\.weight` was made inside torch.inference_mode.*outside that block"):
        do(model, (X,))


def test_no_grad_around_patching_changes_nothing(count_kept):
    model = block()
    with torch.no_grad():
        report = invact.patch(model, (X,))
    assert report.bytes_after == count_kept(model, (X,))
    assert len(report.inverted) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_default_device_and_a_default_dtype_change_nothing(dtype, count_kept):
    model, x = block().to(dtype), X.to(dtype)
    expected = count_kept(model, (x,))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            report = invact.patch(model, (x,))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (report.bytes_before, report.bytes_after) == (expected, count_kept(model, (x,)))
    assert [site.action for site in report.sites] == ["invert"]


def test_an_autocast_around_the_call_is_that_of_training(count_kept):
    model = block()
    with torch.autocast("cpu", torch.bfloat16):
        report = invact.plan(model, (X,))
        kept = count_kept(model, (X,))
        counted = invact.activation_memory(model, (X,))
    assert counted.total_bytes == report.bytes_before
    assert counted.total_bytes + counted.weight_cast_bytes == kept
    assert "autocast to bfloat16" in report.setting
    assert report.to_dict() == invact.plan(model, (X,), autocast=torch.bfloat16).to_dict()


def test_frozen_parts_and_inputs_that_ask_for_a_gradient_are_counted_so(count_kept):
    model = block()
    model[0].requires_grad_(False)
    assert not invact.plan(model, (X,)).inverted
    assert len(as_counted(count_kept, model, (X.clone().requires_grad_(),)).inverted) == 1
    model = block()
    model[3].requires_grad_(False)
    assert not as_counted(count_kept, model).inverted


# --- where the parameters are -------------------------------------------------------------------------


def test_a_model_that_accelerate_dispatched_is_planned_like_any(count_kept):
    from accelerate import dispatch_model

    model = dispatch_model(block(), {"": "cpu"}, force_hooks=True)
    assert len(as_counted(count_kept, model).inverted) == 1


def offloaded():
    from accelerate import cpu_offload

    return cpu_offload(block(), execution_device="cpu")


def partly_offloaded():
    from accelerate import cpu_offload

    model = block()
    cpu_offload(model[3], execution_device="cpu")
    return model


def offloaded_to_disk():
    from accelerate import disk_offload

    return disk_offload(block(), tempfile.mkdtemp(), execution_device="cpu")


def gathered_by_hooks():
    """As DeepSpeed's ZeRO-3 leaves parameters."""
    model = block()
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.data = number, torch.empty(0)
    return model


def half_on_meta():
    return nn.Sequential(block(), nn.Linear(32, 2, device="meta"))


@pytest.mark.parametrize("make", [offloaded, partly_offloaded, offloaded_to_disk, gathered_by_hooks, half_on_meta])
def test_a_model_whose_parameters_are_elsewhere_is_refused_in_one_sentence(make):
    model = make()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"` is not here: .*Patch it while all its parameters are in place"):
        invact.patch(model, (X,))
    assert [type(module) for module in model.modules()] == kinds
    if make in (offloaded, partly_offloaded, offloaded_to_disk):
        assert model(X).shape == X.shape


def test_a_model_wholly_on_meta_is_planned():
    assert len(invact.plan(block().to("meta"), (X,)).inverted) == 1


# --- hooks and odd calls ------------------------------------------------------------------------------


HOOKS = {
    "exchanges": lambda m, args, out: out * 2,
    "gives a view": lambda m, args, out: out.view(out.shape),
    "changes in place": lambda m, args, out: (out.mul_(2), None)[1],
}


@pytest.mark.parametrize("for_all", [False, True], ids=["on the module", "on all modules"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_that_changes_or_exchanges_an_output_is_seen(kind, for_all, count_kept):
    def hook(module, args, out):
        return HOOKS[kind](module, args, out) if isinstance(module, nn.GELU) else None

    model = block()
    add = nn.modules.module.register_module_forward_hook if for_all else model[1].register_forward_hook
    handle = add(hook)
    try:
        (site,) = as_counted(count_kept, model).sites
    finally:
        handle.remove()
    assert (site.action, site.reason) == ("keep", "a hook changes or exchanges its output")


def test_a_hook_that_gives_the_same_output_or_changes_the_input_is_no_obstacle(count_kept):
    model = block()
    model[1].register_forward_hook(lambda m, args, out: out)
    model[1].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    assert len(as_counted(count_kept, model).inverted) == 1


class Odd(nn.Module):
    """Calls its activation as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.up, self.act, self.down, self.how = nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), how

    def forward(self, x):
        return self.how(self, x)

    def step(self, x):
        return self.down(self.act(self.up(x)))


def partly_without_gradients(model, x):
    with torch.no_grad():
        known = model.step(x)
    return model.step(x + known) + model.step(x)


def in_a_loop(model, x):
    for _ in range(4):
        x = model.step(x)
    return x


def recursively(model, x, depth=3):
    return recursively(model, model.step(x), depth - 1) if depth else x


def with_other_shapes(model, x):
    return model.step(x).sum() + model.step(x[:2]).sum() + model.step(x[0]).sum()


def by_its_forward(model, x):
    return model.down(model.act.forward(model.up(x)))


@pytest.mark.parametrize(
    "how",
    [partly_without_gradients, in_a_loop, recursively, with_other_shapes, by_its_forward],
    ids=lambda f: f.__name__,
)
def test_however_a_site_is_called_sites_and_totals_are_the_counts(how, count_kept):
    assert len(as_counted(count_kept, Odd(how)).inverted) == 1


def test_a_module_that_a_hook_calls_again_is_counted_for_both_calls(count_kept):
    model, busy = Odd(Odd.step), []

    def again(module, args, out):
        if not busy:
            busy.append(1)
            module(args[0])
            busy.pop()

    model.act.register_forward_hook(again)
    (site,) = as_counted(count_kept, model).sites
    assert site.reason != "a hook changes or exchanges its output"


def test_what_other_threads_run_is_left_alone_and_said():
    def in_threads(model, x):
        results = []
        threads = [threading.Thread(target=lambda: results.append(model.step(x))) for _ in range(2)]
        for thread in threads:  # one after another: PyTorch's simulated tensors are not made for two at once
            thread.start()
            thread.join()
        return results[0] + results[1]

    report = invact.plan(Odd(in_threads), (X,))
    assert report.sites[0].reason == "called in another thread, where what autograd keeps is not seen"
    assert any(note == "'act' runs in another thread: what is kept there is not counted." for note in report.notes)
