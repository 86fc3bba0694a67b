"""Patched modules of classes of every kind: they look, copy, pickle and save as the stock ones do."""

import abc
import copy
import dataclasses
import inspect
import io
import pickle
import typing

import pytest
import torch
import torch.nn.functional as F
from small_blocks import Written, around, pair
from torch import nn

import invact
from invact.swapping.patched import Patched


@pytest.fixture
def x():
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


REGISTERED = []


class Registers(type):
    def __new__(cls, name, bases, names):
        REGISTERED.append(name)
        return super().__new__(cls, name, bases, names)


class RegistersAbstract(abc.ABCMeta):
    def __new__(cls, name, bases, names):
        REGISTERED.append(name)
        return super().__new__(cls, name, bases, names)


class WithMetaclass(nn.GELU, metaclass=Registers):
    pass


class WithAbstractMetaclass(nn.GELU, metaclass=RegistersAbstract):
    pass


class TellsOfSubclasses(nn.GELU):
    def __init_subclass__(cls, *, must, **kwargs):
        REGISTERED.append(must)


class Subclass(TellsOfSubclasses, must=1):
    pass


class WithTypes(nn.GELU, typing.Generic[typing.TypeVar("T")]):
    pass


@dataclasses.dataclass(eq=False)
class Fields(nn.Module):
    slope: float = 0.2

    def __post_init__(self):
        super().__init__()

    def forward(self, x):
        return F.leaky_relu(x, self.slope)


class Frozen(nn.GELU):
    def __init__(self):
        super().__init__()
        self.frozen = True

    def __setattr__(self, name, value):
        if "frozen" in self.__dict__:
            raise AttributeError("frozen")
        super().__setattr__(name, value)


class CopiesItself(nn.GELU):
    def __deepcopy__(self, memo):
        return type(self)(self.approximate)


class PicklesItself(nn.GELU):
    def __reduce__(self):
        return (self.__class__, (self.approximate,))


class WithState(nn.GELU):
    def __getstate__(self):
        return {**self.__dict__, "more": 1}

    def __setstate__(self, state):
        self.__dict__.update({name: value for name, value in state.items() if name != "more"})


class IsEmpty(nn.GELU):
    def __len__(self):
        return 0


class EqualsAll(nn.GELU):
    def __eq__(self, other):
        return True

    def __hash__(self):
        return 1


KINDS = [WithMetaclass, WithAbstractMetaclass, Subclass, WithTypes, Fields, Frozen, CopiesItself, PicklesItself]
KINDS += [WithState, IsEmpty, EqualsAll]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_patched_module_of_any_class_looks_copies_and_pickles_as_the_stock_one(kind, x, train_alike):
    stock, ours = around(kind()), around(kind())
    pickles, before = [pickle.dumps(stock[1], protocol) for protocol in range(6)], list(REGISTERED)
    assert invact.patch(ours, (x,)).inverted
    act = ours[1]
    assert before == REGISTERED
    assert isinstance(act, kind)
    assert (type(act).__name__, act.__class__.__qualname__, repr(ours)) == (
        kind.__name__,
        kind.__qualname__,
        repr(stock),
    )
    assert vars(act).keys() == vars(stock[1]).keys()
    train_alike(stock, ours)
    for twin in (copy.copy(act), copy.deepcopy(act)):
        assert isinstance(twin, Patched)
        assert vars(twin).keys() == vars(act).keys()
    train_alike(stock, copy.deepcopy(ours))
    for protocol, pickled in enumerate(pickles):
        assert pickle.dumps(act, protocol) == pickled
        assert act.__class__ is type(act)
        assert type(pickle.loads(pickled)) is kind
    invact.unpatch(ours)
    assert type(ours[1]) is kind
    train_alike(stock, ours)


def test_what_is_asked_of_a_patched_class_is_answered_as_stock(x):
    stock, ours = pair(around(nn.GELU("tanh")), x)
    for ask in (inspect.signature, inspect.getsource, inspect.getdoc):
        assert ask(ours[1].forward) == ask(stock[1].forward)
    assert inspect.getsource(type(ours[1])) == inspect.getsource(nn.GELU)
    assert ours[1].approximate == "tanh"
    assert not set(dir(stock[1])) - set(dir(ours[1]))


@pytest.mark.parametrize("written", [False, True])
def test_a_whole_model_is_saved_and_loaded_as_stock(written, x, train_alike):
    import cloudpickle

    stock, ours = pair(Written() if written else around(nn.GELU()), x)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    safe = [type(stock), nn.Linear, nn.GELU]
    with torch.serialization.safe_globals(safe):
        loaded = [torch.load(buffer, weights_only=True), pickle.loads(cloudpickle.dumps(ours))]
    for model in loaded:
        assert not any(isinstance(module, Patched) for module in model.modules())
        train_alike(stock, model)
    assert any(isinstance(module, Patched) for module in ours.modules())


def test_a_reduction_that_nobody_uses_leaves_the_class_as_it_is(x):
    _, ours = pair(around(nn.GELU()), x)
    ours[1].__reduce_ex__(1)
    assert ours[1].__class__ is type(ours[1])
