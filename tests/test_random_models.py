"""Models that hypothesis makes up: patching changes neither their results nor their gradients, and never costs."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import invact

WIDTH = 16


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class WrittenGelu(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return F.gelu(self.layer(x))


class WrittenSwish(WrittenGelu):
    def forward(self, x):
        x = self.layer(x)
        return x * x.sigmoid()


class WrittenInPlace(WrittenGelu):
    def forward(self, x):
        return F.silu(self.layer(x), inplace=True)


class WrittenGate(WrittenGelu):
    def forward(self, x):
        return F.silu(self.layer(x)) * x


class WrittenOfTheInput(WrittenGelu):
    def forward(self, x):
        return self.layer(F.gelu(x, approximate="tanh")) + F.relu(x)


class Checkpointed(nn.Module):
    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer, self.act, self.reentrant = layer, nn.SiLU(), reentrant

    def forward(self, x):
        return checkpoint(self._region, x, use_reentrant=self.reentrant)

    def _region(self, x):
        return self.layer(self.act(self.layer(x)))


def linear(images, bias=True):
    return nn.Conv2d(WIDTH, WIDTH, 1, bias=bias) if images else nn.Linear(WIDTH, WIDTH, bias=bias)


# Each makes a layer for rows (batch, tokens, WIDTH) or images (batch, WIDTH, height, width) that keeps the shape.
LAYERS = {
    "linear": linear,
    "no bias": lambda images: linear(images, bias=False),
    "frozen": lambda images: linear(images).requires_grad_(False),
    "frozen weight": lambda images: _frozen_weight(linear(images)),
    "conv": lambda images: nn.Conv2d(WIDTH, WIDTH, 3, padding=1) if images else nn.Linear(WIDTH, WIDTH),
    "batch norm": lambda images: nn.BatchNorm2d(WIDTH) if images else nn.LayerNorm(WIDTH),
    "frozen norm": lambda images: nn.BatchNorm2d(WIDTH).eval() if images else nn.RMSNorm(WIDTH),
    "group norm": lambda images: nn.GroupNorm(4, WIDTH) if images else nn.LayerNorm(WIDTH, elementwise_affine=False),
    "pool": lambda images: nn.AvgPool2d(3, 1, 1) if images else nn.Softmax(-1),
    "dropout": lambda images: nn.Dropout(0.3),
    "no dropout": lambda images: nn.Dropout(0.0),
    "gelu": lambda images: nn.GELU(),
    "gelu tanh": lambda images: nn.GELU(approximate="tanh"),
    "silu": lambda images: nn.SiLU(),
    "mish": lambda images: nn.Mish(),
    "hardswish": lambda images: nn.Hardswish(),
    "quick gelu": lambda images: QuickGELU(),
    "relu": lambda images: nn.ReLU(),
    "tanh": lambda images: nn.Tanh(),
    "softplus": lambda images: nn.Softplus(),
    "elu": lambda images: nn.ELU(),
    "silu in place": lambda images: nn.SiLU(inplace=True),
    "hardswish in place": lambda images: nn.Hardswish(inplace=True),
    "mish in place": lambda images: nn.Mish(inplace=True),
    "relu in place": lambda images: nn.ReLU(inplace=True),
    "written gelu": lambda images: WrittenGelu(linear(images)),
    "written swish": lambda images: WrittenSwish(linear(images)),
    "written in place": lambda images: WrittenInPlace(linear(images)),
    "written gate": lambda images: WrittenGate(linear(images)),
    "written of the input": lambda images: WrittenOfTheInput(linear(images)),
    "written, frozen": lambda images: WrittenGelu(linear(images)).requires_grad_(False),
    "checkpointed": lambda images: Checkpointed(linear(images), reentrant=False),
    "checkpointed, reentrant": lambda images: Checkpointed(linear(images), reentrant=True),
}


def _frozen_weight(layer):
    layer.weight.requires_grad_(False)
    return layer


# What is done to two values, or one, without a layer.
OF_TWO = {
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "add in place": lambda a, b: a.add_(b),
    "multiply in place": lambda a, b: a.mul_(b),
    "where": lambda a, b: torch.where(a > b, a, b),
    "detach": lambda a, b: a.detach() + b,
}
OF_ONE = {
    "scale": lambda a: a * 0.5,
    "scale in place": lambda a: a.mul_(0.5),
    "reshape": lambda a: a.reshape(a.shape[0], -1).view(a.shape),
    "transpose": lambda a: a.transpose(1, 2).contiguous().transpose(1, 2),
    "halves": lambda a: torch.cat(a.chunk(2, dim=1)[::-1], dim=1),
    "slice": lambda a: a[:1].expand_as(a),
    "flat": lambda a: a.flatten().sigmoid().view_as(a),
    "square": lambda a: a.square(),
    "cast": lambda a: a.double().float(),
    "clone": lambda a: a.clone(),
}


class Graph(nn.Module):
    """Runs steps one after another, each on one of the last values or two; returns what no step has taken.

    Args:
        steps: (name, first, second, shared): an entry of LAYERS, OF_ONE or OF_TWO, how many values back the operands
            are, and whether a layer of that name, if there is one already, is used again.
    """

    def __init__(self, steps, images):
        super().__init__()
        self.stem = linear(images)
        self.layers = nn.ModuleList()
        self.steps = []
        last = {}
        for name, first, second, shared in steps:
            if name in LAYERS and not (shared and name in last):
                last[name] = len(self.layers)
                self.layers.append(LAYERS[name](images))
            self.steps.append((name, last.get(name), first, second))

    def forward(self, x):
        values, taken = [self.stem(x)], set()
        for name, layer, first, second in self.steps:
            a, b = (max(len(values) - 1 - back, 0) for back in (first, second))
            taken |= {a, b} if name in OF_TWO else {a}
            if name in OF_TWO:
                values.append(OF_TWO[name](values[a], values[b]))
            else:
                function = self.layers[layer] if name in LAYERS else OF_ONE[name]
                values.append(function(values[a]))
        return tuple(value for index, value in enumerate(values) if index not in taken)


# Linear layers and convolutions keep what activations give: more of them, more sites that pay.
names = st.sampled_from([*LAYERS, *OF_ONE, *OF_TWO, *["linear", "conv"] * 4])
back = st.sampled_from([0, 0, 0, 1, 2])
graphs = st.tuples(
    st.lists(st.tuples(names, back, back, st.booleans()), min_size=2, max_size=12),
    st.booleans(),  # images or rows
    st.booleans(),  # images in channels_last
    st.booleans(),  # left in training mode, or in evaluation mode and trained so
)


class Held:
    def __init__(self, tensor):
        self.tensor = tensor


def kept_and_alive(model, x):
    """Bytes that one real forward keeps for backward, of graphs that its outputs still hold; own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    packed = []

    def pack(tensor):
        held = Held(tensor.detach())
        packed.append(weakref.ref(held))
        return held

    torch.manual_seed(0)
    with saved_tensors_hooks(pack, lambda held: held.tensor):
        output = model(x.clone())
    alive = [held.tensor.untyped_storage() for reference in packed if (held := reference()) is not None]
    storages = {storage.data_ptr(): storage.nbytes() for storage in alive}
    del output
    return sum(nbytes for address, nbytes in storages.items() if address not in own)


def trained_once(model, x):
    """Outputs, and the gradients of all parameters in one vector; None if stock PyTorch refuses the graph."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    outputs = [value for value in model(x.clone()) if value.requires_grad]
    if outputs:
        sum(value.square().mean() + value.sin().mean() for value in outputs).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    if not gradients:
        return None
    return torch.cat([value.detach().flatten() for value in outputs]), torch.cat(gradients)


def check(steps, images, channels_last, training):
    torch.manual_seed(0)
    model = Graph(steps, images).train(training)
    x = torch.randn(2, WIDTH, 4, 4) if images else torch.randn(3, 5, WIDTH)
    if images and channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    try:
        stock = trained_once(copy.deepcopy(model), x)
    except RuntimeError as error:  # stock PyTorch itself refuses some changes in place
        assume(not any(words in str(error) for words in ("inplace", "in-place", "single memory location")))
        raise
    assume(stock is not None and all(torch.isfinite(t).all() for t in stock))
    assume(stock[1].norm() < 1e4)
    before = kept_and_alive(copy.deepcopy(model), x)

    report = invact.patch(model, (x,))
    event(f"{len(report.inverted)} sites inverted")
    after = kept_and_alive(copy.deepcopy(model), x)
    assert report.bytes_before == pytest.approx(before, rel=0.01)
    assert report.bytes_after == pytest.approx(after, rel=0.01)
    assert after <= before
    if not any("checkpointed" in note for note in report.notes):  # where what is saved is a peak's
        assert sum(site.bytes_saved for site in report.inverted) == report.bytes_before - report.bytes_after

    output, gradient = trained_once(copy.deepcopy(model), x)
    torch.testing.assert_close(output, stock[0], rtol=1e-5, atol=1e-5)
    assert (gradient - stock[1]).norm() <= 1e-4 * stock[1].norm()

    assert invact.unpatch(model) == len(report.inverted)
    again = trained_once(model, x)
    assert torch.equal(again[0], stock[0])
    assert torch.equal(again[1], stock[1])


unhurried = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@settings(unhurried, max_examples=100, derandomize=True)
@given(graphs)
def test_a_hundred_random_models_are_patched_without_a_change_in_what_they_learn(graph):
    check(*graph)


@pytest.mark.slow
@settings(unhurried, max_examples=1000)
@given(graphs)
def test_a_thousand_random_models_are_patched_without_a_change_in_what_they_learn(graph):
    check(*graph)
