"""What the code of an activation reads may change, and what it does besides computing is done: as in stock."""

import copy
import functools
import logging
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invact
from invact.swapping.patched import Patched

SLOPE, CALLS, STEEPER = 0.2, [], 1.0
settings = types.ModuleType("settings")


class Config:
    slope = 0.2


class Scaled:
    """A descriptor that gives something else than the instance holds."""

    def __get__(self, instance, kind=None):
        return self if instance is None else instance.__dict__["slope"] * STEEPER

    def __set__(self, instance, value):
        instance.__dict__["slope"] = value


class Object:
    slope = 0.2

    def leaky(self, x):
        return F.leaky_relu(x, self.slope)


bound_elsewhere = Object()
leaky_elsewhere = bound_elsewhere.leaky


class Own(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, self.slope)


class OfClass(Own):
    slope = 0.2


class Mixin:
    slope = 0.2


class OfMixin(Own, Mixin):
    pass


class OfInstance(Own):
    def __init__(self):
        super().__init__()
        self.slope = 0.2


class OfProperty(Own):
    @property
    def slope(self):
        return SLOPE


class OfCachedProperty(Own):
    @functools.cached_property
    def slope(self):
        return SLOPE


class OfDescriptor(Own):
    slope = Scaled()

    def __init__(self):
        super().__init__()
        self.slope = 0.2


class OfGetattr(Own):
    def __getattr__(self, name):
        return SLOPE if name == "slope" else super().__getattr__(name)


class OfBuiltin(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, getattr(self, "slope", 0.2))


class OfModule(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, settings.slope)


class OfOtherClass(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, Config.slope)


class OfObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.config, self.values = Object(), [0.2]

    def forward(self, x):
        return F.leaky_relu(x, self.config.slope * self.values[0] / 0.2)


class OfBoundMethod(nn.Module):
    def forward(self, x):
        return leaky_elsewhere(x)


class OfMethod(nn.Module):
    def compute(self, x):
        return F.leaky_relu(x, 0.2)

    def forward(self, x):
        return self.compute(x)


class OfItself(Own):
    """Its forward is kept as an attribute, as in transformers."""

    def __init__(self):
        super().__init__()
        self.compute, self.slope = self._compute, 0.2

    def _compute(self, x):
        return F.leaky_relu(x, self.slope)

    def forward(self, x):
        return self.compute(x)


def steeper(x):
    return F.leaky_relu(x, 0.9)


def set_on(owner, name, value):
    return lambda monkeypatch, act: monkeypatch.setattr(owner, name, value)


CHANGES = {
    "instance": (OfInstance, lambda monkeypatch, act: setattr(act, "slope", 0.9)),
    "class": (OfClass, set_on(OfClass, "slope", 0.9)),
    "class, on the instance": (OfClass, lambda monkeypatch, act: setattr(act, "slope", 0.9)),
    "mixin": (OfMixin, set_on(Mixin, "slope", 0.9)),
    "property": (OfProperty, lambda monkeypatch, act: monkeypatch.setitem(globals(), "SLOPE", 0.9)),
    "cached property": (OfCachedProperty, lambda monkeypatch, act: monkeypatch.setitem(globals(), "SLOPE", 0.9)),
    "descriptor": (OfDescriptor, lambda monkeypatch, act: monkeypatch.setitem(globals(), "STEEPER", 4.0)),
    "__getattr__": (OfGetattr, lambda monkeypatch, act: monkeypatch.setitem(globals(), "SLOPE", 0.9)),
    "getattr": (OfBuiltin, lambda monkeypatch, act: setattr(act, "slope", 0.9)),
    "module": (OfModule, set_on(settings, "slope", 0.9)),
    "another class": (OfOtherClass, set_on(Config, "slope", 0.9)),
    "object": (OfObject, lambda monkeypatch, act: setattr(act.config, "slope", 0.9)),
    "list": (OfObject, lambda monkeypatch, act: act.values.__setitem__(0, 0.9)),
    "bound method": (OfBoundMethod, lambda monkeypatch, act: monkeypatch.setattr(bound_elsewhere, "slope", 0.9)),
    "method of the class": (OfMethod, set_on(OfMethod, "compute", lambda self, x: steeper(x))),
    "method on the instance": (OfMethod, lambda monkeypatch, act: setattr(act, "compute", steeper)),
    "what a method of its own reads": (OfItself, lambda monkeypatch, act: setattr(act, "slope", 0.9)),
    "a method of its own": (OfItself, lambda monkeypatch, act: setattr(act, "compute", steeper)),
    "alpha": (lambda: nn.ELU(0.7), lambda monkeypatch, act: setattr(act, "alpha", 0.2)),
    "beta": (nn.Softplus, lambda monkeypatch, act: setattr(act, "beta", 3.0)),
    "approximate": (nn.GELU, lambda monkeypatch, act: setattr(act, "approximate", "tanh")),
    "inplace on": (nn.SiLU, lambda monkeypatch, act: setattr(act, "inplace", True)),
    "inplace off": (lambda: nn.SiLU(True), lambda monkeypatch, act: setattr(act, "inplace", False)),
}


class Written(nn.Module):
    """The expression of an activation's forward, in a block of its own."""

    scale = 1.0

    def __init__(self):
        super().__init__()
        self.up, self.down, self.slope = nn.Linear(16, 32), nn.Linear(32, 16), 0.2


class WrittenOfModule(Written):
    def forward(self, x):
        return self.down(F.leaky_relu(self.up(x), settings.slope))


class WrittenOfInstance(Written):
    def forward(self, x):
        return self.down(F.leaky_relu(self.up(x), self.slope))


class WrittenOfDescriptor(Written):
    slope = Scaled()

    def forward(self, x):
        return self.down(F.leaky_relu(self.up(x), self.slope))


WRITTEN = {
    "written, module": (WrittenOfModule, CHANGES["module"][1]),
    "written, instance": (WrittenOfInstance, CHANGES["instance"][1]),
    "written, descriptor": (WrittenOfDescriptor, CHANGES["descriptor"][1]),
    "written, function": (WrittenOfInstance, set_on(F, "leaky_relu", lambda x, slope: 2 * x)),
}


@pytest.mark.parametrize("name", [*CHANGES, *WRITTEN])
def test_what_changes_after_patching_counts_as_in_stock(name, monkeypatch, run_backward):
    make, change = (CHANGES | WRITTEN)[name]
    monkeypatch.setattr(settings, "slope", 0.2, raising=False)
    stock = make() if name in WRITTEN else nn.Sequential(nn.Linear(16, 32), make(), nn.Linear(32, 16))
    ours, x = copy.deepcopy(stock), torch.randn(8, 16)
    invact.patch(ours, (x,))
    before, _ = run_backward(stock, (x,)), run_backward(ours, (x,))
    for model in (stock, ours):
        change(monkeypatch, model if name in WRITTEN else model[1])
    after = run_backward(stock, (x,))
    for a, b in zip(after, run_backward(ours, (x,)), strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()
    assert name in ("cached property", "inplace on", "inplace off") or not torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    "name", ["instance", "class", "mixin", "property", "method of the class", "alpha", "inplace on"]
)
def test_what_can_be_watched_is_inverted_until_it_changes(name):
    model = nn.Sequential(nn.Linear(16, 32), CHANGES[name][0](), nn.Linear(32, 16))
    invact.patch(model, (torch.randn(8, 16),))
    assert isinstance(model[1], Patched)


TOTAL = 0


class Effects(nn.Module):
    calls = 0


class CountsGlobally(Effects):
    def forward(self, x):
        global TOTAL
        TOTAL += 1
        return F.gelu(x)


class CountsInItsClass(Effects):
    def forward(self, x):
        type(self).calls += 1
        return F.gelu(x)


class CountsInANamedClass(Effects):
    def forward(self, x):
        Effects.calls += 1
        return F.gelu(x)


class CountsInItself(Effects):
    def forward(self, x):
        self.calls += 1
        return F.gelu(x)


class Appends(Effects):
    def forward(self, x):
        CALLS.append(1)
        return F.gelu(x)


def counting(x):
    global TOTAL
    TOTAL += 1
    return F.gelu(x)


class CallsWhatCounts(Effects):
    def forward(self, x):
        return counting(x)


@pytest.mark.parametrize(
    "kind", [CountsGlobally, CountsInItsClass, CountsInANamedClass, CountsInItself, Appends, CallsWhatCounts]
)
def test_what_a_forward_counts_is_counted_after_patching_too(kind):
    counts = []
    for patched in (False, True):
        model, x = nn.Sequential(nn.Linear(16, 32), kind(), nn.Linear(32, 16)), torch.randn(8, 16)
        if patched:
            invact.patch(model, (x,))
        before = TOTAL + len(CALLS) + model[1].calls
        for _ in range(3):
            model(x).sum().backward()
        counts.append(TOTAL + len(CALLS) + model[1].calls - before)
    assert counts == [3, 3]


class Prints(nn.Module):
    def forward(self, x):
        print("called")
        return F.gelu(x)


class Logs(nn.Module):
    def forward(self, x):
        logging.getLogger("strangers").warning("called")
        return F.gelu(x)


@pytest.mark.parametrize("kind", [Prints, Logs])
def test_what_a_forward_says_is_said_after_patching_too(kind, capsys, caplog):
    model, x = nn.Sequential(nn.Linear(16, 32), kind(), nn.Linear(32, 16)), torch.randn(8, 16)
    invact.patch(model, (x,))
    capsys.readouterr(), caplog.clear()
    model(x).sum().backward()
    assert (capsys.readouterr().out + caplog.text).count("called") == 1


class Leaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.function = functools.partial(F.leaky_relu, negative_slope=0.2)

    def forward(self, x):
        return self.function(x)


@pytest.fixture
def x():
    return torch.randn(8, 16)


def test_keywords_of_a_partial_function_may_change(train_alike, x):
    stock = nn.Sequential(nn.Linear(16, 32), Leaky(), nn.Linear(32, 16))
    ours = copy.deepcopy(stock)
    assert invact.patch(ours, (x,)).inverted
    for model in (stock, ours):
        model[1].function.keywords["negative_slope"] = 0.9
    train_alike(stock, ours)
