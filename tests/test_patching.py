"""Patching is in place, all or nothing, and undone by unpatch; bad input gets one clear error."""

import copy
import pickle

import pytest
import torch
from torch import nn

import invact
from invact.planning.plans import decide
from invact.swapping import swaps as swapping
from invact.swapping.inversion import Inverted


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 16))


@pytest.fixture
def x():
    return torch.randn(4, 16)


def test_patch_replaces_in_place_and_keeps_names_parameters_and_state(model, x):
    names, state, modules = [n for n, _ in model.named_modules()], model.state_dict(), list(model)
    parameters = list(model.parameters())
    invact.patch(model, (x,))
    assert [isinstance(m, Inverted) for m in model] == [False, True, False, True, False]
    assert [n for n, _ in model.named_modules()] == names
    assert all(a is b for a, b in zip(model, modules, strict=True))
    assert list(model.state_dict()) == list(state)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_patched_puts_the_model_back_also_after_an_error(model, x):
    before = list(model)
    with invact.patched(model, (x,)) as report:
        assert len(report.inverted) == 2
        assert isinstance(model[1], Inverted)
    assert all(a is b for a, b in zip(model, before, strict=True))
    with pytest.raises(KeyboardInterrupt), invact.patched(model, (x,)):
        raise KeyboardInterrupt
    assert all(a is b for a, b in zip(model, before, strict=True))


def test_patching_again_changes_nothing_and_says_so(model, x):
    invact.patch(model, (x,))
    report = invact.patch(model, (x,))
    assert {site.reason for site in report.sites} == {"already inverted by an earlier patch"}
    assert report.bytes_after == report.bytes_before
    assert "2 sites were patched before" in report.notes[0]
    with invact.patched(model, (x,)):
        pass
    assert invact.unpatch(model) == 2
    assert invact.unpatch(model) == 0


def test_patching_again_says_that_what_patched_modules_write_out_is_not_looked_for():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 16)

        def forward(self, x):
            return self.down(torch.nn.functional.gelu(self.norm(self.up(x))))

    model, inputs = nn.Sequential(Written(), Written()), (torch.randn(256, 16),)
    report = invact.patch(model, inputs, exact=True)
    assert len(report.sites) == 2
    again = invact.plan(model, inputs)
    assert again.sites == []
    assert any("was patched before" in note and "invact.unpatch(model)" in note for note in again.notes)
    invact.unpatch(model)
    assert len(invact.plan(model, inputs).sites) == 2


def test_a_failure_half_way_undoes_what_was_done(model, x, monkeypatch):
    swapped = []

    def fails_at_the_second(module, kind):
        if issubclass(kind, Inverted):
            if swapped:
                raise KeyboardInterrupt
            swapped.append(module)
        set_class(module, kind)

    set_class = swapping.set_class
    decided = decide(model, (x,))
    monkeypatch.setattr(swapping, "set_class", fails_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        decided.apply(model)
    assert swapped == [model[1]]
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Linear, nn.SiLU, nn.Linear]


def test_hooks_of_the_activation_go_on_being_called_and_their_handles_remove_them(model, x):
    seen = []
    handle = model[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    invact.patch(model, (x,))  # hooks run while planning too: some, such as weight norm's, are part of the model
    seen.clear()
    model(x)
    assert seen == [(4, 64)]
    handle.remove()
    model(x)
    assert len(seen) == 1


def test_a_deepcopy_is_patched_and_a_pickle_is_stock(model, x, run_backward):
    expected = run_backward(model, (x,))[1]
    invact.patch(model, (x,))
    twin = copy.deepcopy(model)
    assert isinstance(twin[1], Inverted)
    assert twin[1] is not model[1]
    gradient = run_backward(twin, (x,))[1]
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    assert invact.unpatch(twin) == 2
    assert torch.equal(run_backward(twin, (x,))[1], expected)

    stock = pickle.loads(pickle.dumps(model))
    assert type(stock[1]) is nn.GELU
    assert torch.equal(run_backward(stock, (x,))[1], expected)
    assert isinstance(model[1], Inverted)


def test_an_activation_in_place_stays_in_place(count_kept, run_backward):
    class IgnoresResults(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act, self.out = (
                nn.Conv2d(3, 8, 3),
                nn.BatchNorm2d(8),
                nn.SiLU(True),
                nn.Conv2d(8, 8, 3),
            )

        def forward(self, x):
            x = self.norm(self.conv(x))
            self.act(x)
            x = self.norm(self.out(x))
            nn.functional.silu(x, inplace=True)
            return self.out(x)

    model, images = IgnoresResults(), torch.randn(2, 3, 12, 12)
    kept, (output, gradient) = count_kept(model, (images,)), run_backward(model, (images,))
    report = invact.patch(model, (images,))
    assert [(site.path, site.action) for site in report.sites] == [("forward:silu", "derive"), ("act", "derive")]
    assert (report.bytes_before, report.bytes_after) == (kept, count_kept(model, (images,)))
    after = run_backward(model, (images,))
    torch.testing.assert_close(after[0], output, rtol=1e-5, atol=1e-5)
    assert (after[1] - gradient).norm() < 1e-4 * gradient.norm()


def test_without_gradients_the_result_is_the_stock_one_bit_for_bit(model, x):
    expected = model(x)
    invact.patch(model, (x,))
    for mode in (model.train(), model.eval()):
        with torch.no_grad():
            assert torch.equal(mode(x), expected)
        with torch.inference_mode():
            assert torch.equal(mode(x), expected)


def test_a_model_without_activations_gets_a_report_that_says_so(x):
    report = invact.patch(nn.Linear(16, 16), (x,))
    assert report.sites == []
    assert report.saving == 0
    assert "No pointwise activation" in str(report)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (lambda: (torch.randn(4, 17),), RuntimeError, "shapes cannot be multiplied"),
        (lambda: (torch.ones(4, 16, dtype=torch.long),), RuntimeError, "dtype"),
        (lambda: (torch.randn(4, 16, dtype=torch.complex64),), TypeError, "complex"),
        (lambda: torch.randn(4, 16), TypeError, "tuple of positional arguments"),
        (lambda: None, ValueError, "Pass example_inputs"),
        (lambda: {"wrong": torch.randn(4, 16)}, TypeError, "wrong"),
    ],
    ids=["wrong shape", "integers", "complex", "no tuple", "no inputs", "wrong name"],
)
def test_bad_inputs_get_one_clear_error_and_leave_the_model_as_it_was(model, inputs, error, message):
    before, state = list(model), copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        invact.patch(model, inputs())
    assert all(a is b for a, b in zip(model, before, strict=True))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_what_is_no_model_and_what_is_no_dtype_are_refused(model, x):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, but got str"):
        invact.patch("bert-base-uncased")
    with pytest.raises(TypeError, match=r"Pass torch\.bfloat16"):
        invact.plan(model, (x,), autocast="bf16")


def test_an_activation_registered_under_several_parents_is_replaced_everywhere(x, run_backward):
    act = nn.GELU()
    block = lambda: nn.Sequential(nn.Linear(16, 16), act, nn.Linear(16, 16))  # noqa: E731
    model = nn.Sequential(block(), block())
    expected = run_backward(model, (x,))[1]
    invact.patch(model, (x,))
    assert isinstance(model[0][1], Inverted)
    assert model[0][1] is model[1][1]
    gradient = run_backward(model, (x,))[1]
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    assert invact.unpatch(model) == 1
    assert model[0][1] is model[1][1] is act


def test_a_model_that_fsdp_has_sharded_is_refused_with_the_order_that_works(model, x):
    import torch.distributed.fsdp

    class Sharded(torch.distributed.fsdp.FSDPModule, nn.Sequential):
        pass

    sharded = nn.Sequential.__new__(Sharded)
    nn.Sequential.__init__(sharded, *model)
    with pytest.raises(ValueError, match="Patch it first and shard it afterwards"):
        invact.patch(sharded, (x,))
