"""A fault of ours comes with its traceback and as what it is; one of the user's model is told as the model's."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invact
from invact.errors.own_errors import ImitatedError, raised_by_invact, users_call
from invact.planning.options import matches
from invact.planning.plans import decide_for_device

X = torch.randn(4, 16)


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16)

    def forward(self, x):
        return self.down(F.gelu(self.act(self.up(x))))


class OursError(Exception):
    pass


def as_ours(function):
    """The function as if it stood in a file of ours."""
    return types.FunctionType(function.__code__, {**globals(), "__name__": "invact.somewhere"}, function.__name__)


@as_ours
def failing(*args, **kwargs):
    raise OursError


@as_ours
def torch_fails(*args, **kwargs):
    return F.linear(torch.ones(2, 3), torch.ones(2, 2))


PLACES = [
    *(
        "invact.ledger.ledger.storage_sizes",
        "invact.ledger.ledger.Ledger._enter_module",
        "invact.ledger.ledger.Ledger._pack",
    ),
    *("invact.ledger.ledger.Ledger.memory", "invact.ledger.ledger.dense_parts", "invact.probing.recording._opened"),
    *(
        "invact.probing.recording.OpenCall.closed",
        "invact.probing.probe.autocast_as_set",
        "invact.recognition.dependencies.Dependencies.unchanged",
    ),
    *("invact.inverting.autograd_functions.invert", "invact.inverting.autograd_functions.wants_gradient"),
    "invact.swapping.swaps.set_class",
    *("invact.probing.probe.checkpoints_counted", "invact.probing.probe.stand_in", "invact.planning.walking.recognise"),
    "invact.planning.plans.decide_sites",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", [failing, torch_fails])
def test_a_fault_of_ours_is_raised_as_it_is_and_not_told_as_the_models(place, fault, monkeypatch):
    model = Written()
    monkeypatch.setattr(place, fault)
    with pytest.raises(OursError if fault is failing else RuntimeError) as caught:
        invact.plan(model, (X,))
    assert not getattr(caught.value, "__notes__", None)
    assert "example inputs" not in str(caught.value)


@pytest.mark.parametrize(
    "place", ["as_on_gpu._fused_attention", "as_on_gpu._added", "simulated_tensors.suggest_memory_format"]
)
def test_a_fault_in_what_imitates_kernels_is_not_taken_for_one_of_the_operation(place, monkeypatch):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act, self.down = nn.BatchNorm1d(4), nn.GELU(), nn.Linear(16, 16)

        def forward(self, x):
            x = self.norm(x.view(1, 4, 16)).view(1, 1, 4, 16)
            return self.down(self.act(F.scaled_dot_product_attention(x, x, x, torch.ones(4, 4, dtype=torch.bool))))

    monkeypatch.setattr(f"invact.simulation.{place}", failing)
    device = "cpu" if place.endswith("suggest_memory_format") else "cuda"
    with pytest.raises(OursError) as caught:
        decide_for_device(Attends(), (X,), device=device)
    assert not getattr(caught.value, "__notes__", None)


@pytest.mark.parametrize("x", [torch.randn(4, 3), torch.zeros(4, 16, dtype=torch.long)], ids=["shape", "dtype"])
def test_wrong_inputs_are_told_with_what_was_given(x):
    with pytest.raises(RuntimeError) as caught:
        invact.plan(Written(), (x,))
    assert not raised_by_invact(caught.value)
    if hasattr(caught.value, "__notes__"):
        assert "Pass example_inputs with which the model runs." in caught.value.__notes__[0]


def test_an_error_in_a_hook_of_the_users_is_the_users():
    model = Written()
    model.act.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        invact.plan(model, (X,))
    assert not raised_by_invact(caught.value)


def test_whose_fault_it_is_is_told_by_the_innermost_code_that_is_not_pytorchs():
    with pytest.raises(ValueError, match="five") as users:
        users_call(int, "five")
    assert not raised_by_invact(users.value)
    with pytest.raises(TypeError) as users:
        users_call(nn.Linear(1, 1), "text")
    assert not raised_by_invact(users.value)
    with pytest.raises(TypeError) as ours:
        matches("path", 5)
    assert raised_by_invact(ours.value)
    assert not raised_by_invact(ImitatedError())


class Hungry(nn.Module):
    """Branches on a value, so that it runs for real, and finds no memory there."""

    def __init__(self, error, while_simulated=False):
        super().__init__()
        self.layer, self.error, self.simulated = nn.Linear(16, 16), error, while_simulated

    def forward(self, x):
        if not self.simulated and x.sum().item() > 1e9:
            return x
        print(f"a batch of {len(x)}")
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError("numpy"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes."),
    ],
    ids=["of a GPU", "of Python", "of the CPU"],
)
def test_out_of_memory_ends_the_probe_and_the_whole_batch_is_not_tried(error, capsys):
    with pytest.raises(type(error)) as caught:
        invact.plan(Hungry(error), (X,))
    assert caught.value is error
    assert capsys.readouterr().out == "a batch of 1\n"
    with pytest.raises(type(error)):
        invact.plan(Hungry(error, while_simulated=True), (X,))
    assert capsys.readouterr().out == "a batch of 4\n"
