"""How a module is patched: it stays the object it is and gets a class of its own, a subclass of the one it had.

So its attributes, hooks, parameters and every reference to it are the user's, as `torch.nn.utils.parametrize` does it.
The class alone knows of us: it runs an activation inverted or with an approximate derivative, or a method with such
expressions in it, or a norm by one operator, or sets hooks on what autograd keeps while the module runs; it pickles as
the class that the module had, and goes when `Swaps.undo` gives the module that class back.
"""

from __future__ import annotations

import abc
import copy
import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from invact.deriving.hooks import SMALLEST, Deriving, is_deriving, may_derive
from invact.errors.own_errors import users_call
from invact.inverting import operators
from invact.inverting.few_bits import few_bits, may_approximate
from invact.kernels import Curve
from invact.pytorch.inside import hooks_on_all_modules, transforms_active, tree_leaves
from invact.recognition.norms import Fusion
from invact.recognition.rewriting import Runner, Written, calling, methods_of
from invact.recognition.settings import Settings

SMALLEST_INVERTED = 16384
"""Elements from which on an activation is inverted where its output could be derived as well.

Both keep one tensor, and inverting computes nothing twice; but it takes many operators of a CPU, and a kernel's start
of a GPU's host: for fewer elements than these more time than the stock operator run again. Below `SMALLEST` nothing
is derived, and inverting is all there is, as it is of an expression that is inverted: there it keeps less.
"""

LARGEST_INVERTED_ON_CPU = 262144
"""Elements up to which it is inverted on a CPU, where its operators are passes over memory: of more it takes
milliseconds longer than the stock operator run again."""


@dataclass(frozen=True)
class Inversion:
    """How a site is inverted.

    Attributes:
        curve: what is computed there.
        settings: what its code reads besides its input. While it is anything else, the stock code runs.
        in_place: the output takes the memory of the input.
        derivable: where tensors are derived, the stock code would keep no more, since its output is made again.
    """

    curve: Curve
    settings: Settings
    in_place: bool = False
    derivable: bool = True

    def applies(self, module: nn.Module, x: Any) -> bool:
        """Whether `x` is to be computed here and not by the stock code."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout is not torch.strided:
            return False  # fx, for one, traces with what is no tensor
        if getattr(_THREAD, "watched", None) is not None and transforms_active():
            return False  # what hooks change can not be told there
        return operators.wants_gradient(x) and self.settings.unchanged(module)

    def __call__(self, x: Tensor) -> Tensor:
        watched = getattr(_THREAD, "watched", None)
        before = x.clone() if watched is not None and self.in_place else x
        y = operators.invert(x, self.curve, self.in_place)
        if watched is not None:
            watched.append((before, y, y.grad_fn, y._version))
        return y


@dataclass(frozen=True)
class InvertedExpression:
    """Runs in an expression's place; see `invact.recognition.rewriting`."""

    inversion: Inversion

    def __call__(self, module: nn.Module, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.inversion(x) if self.inversion.applies(module, x) else original(x)


@dataclass(frozen=True)
class Approximation:
    """How the derivative at a site is approximated; see `invact.inverting.few_bits`.

    Attributes:
        curve, settings: as of an `Inversion`.
        bits: kept per element, 1 to 4.
        in_place: the output takes the memory of the input.
    """

    curve: Curve
    settings: Settings
    bits: int
    in_place: bool = False

    def applies(self, module: nn.Module, x: Any) -> bool:
        """Whether `x` is to be computed here and not by the stock code."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout is not torch.strided:
            return False
        return may_approximate(x) and self.settings.unchanged(module)

    def __call__(self, x: Tensor) -> Tensor:
        return few_bits(x, self.curve, self.bits, self.in_place)


@dataclass(frozen=True)
class ApproximateExpression:
    """Runs in an expression's place; see `invact.recognition.rewriting`."""

    approximation: Approximation

    def __call__(self, module: nn.Module, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.approximation(x) if self.approximation.applies(module, x) else original(x)


# --- the classes --------------------------------------------------------------------------------------


_THREAD = threading.local()
_CLASS = object.__dict__["__class__"]


class _ClassAsPickled:
    """`__class__` as ever, but for once after `__reduce_ex__`: pickle compares what that says with it."""

    def __get__(self, module: Any, kind: type) -> Any:
        pickled = getattr(_THREAD, "pickled", None)
        if pickled is not None and pickled() is module:
            _THREAD.pickled = None
            return module._invact_stock
        return _CLASS.__get__(module)

    def __set__(self, module: Any, kind: type) -> None:
        _CLASS.__set__(module, kind)


class PatchedSite(NamedTuple):
    """What stands in an activation's place: the method, the curve, and the bits of a derivative that is approximate."""

    method: str
    curve: str
    bits: int | None = None


class Patched:
    """In every class that a module is given here; the first base, before the class that the module had.

    Attributes:
        _invact_stock: the class that the module had before any of ours.
        _invact_below: the class under this one, which may be one of ours.
        _invact_checkpoints: whether one of ours checkpoints its forward.
        _invact_sites: what is inverted or approximated in it; the method of an activation is "".
    """

    _invact_stock: ClassVar[type[nn.Module]]
    _invact_below: ClassVar[type[nn.Module]]
    _invact_checkpoints: ClassVar[bool] = False
    _invact_sites: ClassVar[tuple[PatchedSite, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The user's own `__init_subclass__`, which may keep a register, is not told of our classes."""

    __class__ = _ClassAsPickled()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the stock module would be: a pickle can be read where there is no invact."""
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        make, arguments, *rest = reduced
        kind, stock = type(self), self._invact_stock
        make, *arguments = (stock if part is kind else part for part in (make, *arguments))
        if getattr(make, "__name__", "").startswith("__newobj"):
            _THREAD.pickled = weakref.ref(self)
        return (make, tuple(arguments), *rest)

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script asks for this first; further on it would mix our method up with its stock source."""
        raise NotImplementedError(
            f"torch.jit.script can not compile a {self._invact_stock.__name__} that invact has patched, since "
            "TorchScript has no autograd functions and no hooks on what autograd keeps. Call invact.unpatch(model) "
            "first."
        )

    def __copy__(self) -> Any:
        return self._twin(super(), "__copy__", lambda part: part, {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._twin(super(), "__deepcopy__", lambda part: copy.deepcopy(part, memo), memo, memo)

    def _twin(self, stock: Any, own: str, copied: Callable[[Any], Any], memo: dict[int, Any], *args: Any) -> Any:
        """A copy as the stock class makes it, patched as this is."""
        if hasattr(stock, own):
            twin = getattr(stock, own)(*args)
        else:
            reduced = stock.__reduce_ex__(4)
            if isinstance(reduced, str):
                return self
            make, arguments, *rest = reduced
            twin = memo[id(self)] = make(*copied(arguments))
            if rest and rest[0] is not None:
                _set_state(twin, copied(rest[0]))
        if type(twin) is self._invact_stock:
            _set_class(twin, type(self))
        return twin


def _set_state(twin: Any, state: Any) -> None:
    """As `copy` does it."""
    if hasattr(twin, "__setstate__"):
        twin.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    twin.__dict__.update(attributes or {})
    for name, value in (slots or {}).items():
        setattr(twin, name, value)


class Inverted(Patched):
    """In the class of an activation that keeps its output instead of its input for backward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Hooks may change the output in place, which stock allows: then the input is kept after all."""
        hooked = self._forward_hooks or hooks_on_all_modules()  # type: ignore[attr-defined]
        if torch.compiler.is_compiling() or not hooked:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with _changed_outputs_kept_right():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def _changed_outputs_kept_right() -> Iterator[None]:
    outer = getattr(_THREAD, "watched", None)
    watched: list[tuple[Tensor, Tensor, Any, int]] = []
    _THREAD.watched = watched
    try:
        yield
    finally:
        _THREAD.watched = outer
    for x, y, node, version in watched:
        if y._version != version and hasattr(node, "input"):
            node.input = x


# By the class that a module had and what is inverted in it, so that the equal layers of a model share one class and
# torch.compile sees one. A class that no module has any more is collected.
_CLASSES: weakref.WeakValueDictionary[tuple[Any, ...], type] = weakref.WeakValueDictionary()


# By the class under it, which is weak here too: those of a probe hold what it saw, and go with it in one collection.
_DERIVING: weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[tuple[bool, bool], type]]
_DERIVING = weakref.WeakKeyDictionary()
_CHECKPOINTED: weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[str, type]] = weakref.WeakKeyDictionary()


def _inverted_class(stock: type[nn.Module], inversion: Inversion) -> type:
    key = (stock, inversion)
    kind = _CLASSES.get(key)
    if kind is None:
        methods = {"forward": _inverted_forward(stock, inversion)}
        kind = _CLASSES[key] = _class_over(stock, Inverted, methods, (PatchedSite("", str(inversion.curve)),))
    return kind


def _inverted_forward(stock: type[nn.Module], inversion: Inversion) -> Callable[..., Any]:
    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Who holds on to this method may call it when the module has its own class again.
        alone = len(args) == 1 and not kwargs and _is_patched(self)
        if alone and not (inversion.derivable and _better_derived(args[0])) and inversion.applies(self, args[0]):
            return inversion(args[0])
        return stock.forward(self, *args, **kwargs)

    return forward


def _approximate_class(stock: type[nn.Module], approximation: Approximation) -> type:
    key = (stock, approximation)
    kind = _CLASSES.get(key)
    if kind is None:
        methods = {"forward": _approximate_forward(stock, approximation)}
        site = PatchedSite("", str(approximation.curve), approximation.bits)
        kind = _CLASSES[key] = _class_over(stock, Patched, methods, (site,))
    return kind


def _approximate_forward(stock: type[nn.Module], approximation: Approximation) -> Callable[..., Any]:
    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and _is_patched(self) and approximation.applies(self, args[0]):
            return approximation(args[0])
        return stock.forward(self, *args, **kwargs)

    return forward


def _fused_class(stock: type[nn.Module], fusion: Fusion) -> type:
    key = (stock, fusion)
    kind = _CLASSES.get(key)
    if kind is None:
        kind = _CLASSES[key] = _class_over(stock, Patched, {"forward": _fused_forward(stock, fusion)}, ())
    return kind


def _fused_forward(stock: type[nn.Module], fusion: Fusion) -> Callable[..., Any]:
    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs and _is_patched(self) else None
        if isinstance(x, Tensor) and fusion.applies(self, x, _planned_device() or x.device):
            return fusion(self, x)
        return stock.forward(self, *args, **kwargs)

    return forward


def _better_derived(x: Any) -> bool:
    """Whether to run the stock operator, and once more in backward, takes less time than to invert."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return False  # before asking for a size, which a graph would be bound to
    count = x.numel()
    if count < SMALLEST or SMALLEST_INVERTED <= count <= LARGEST_INVERTED_ON_CPU:
        return False
    if count > LARGEST_INVERTED_ON_CPU and (_planned_device() or x.device).type != "cpu":
        return False
    return is_deriving(True)


def _planned_device() -> torch.device | None:
    return getattr(_THREAD, "device", None)


@contextmanager
def as_on(device: torch.device) -> Iterator[None]:
    """What is inverted or fused inside is what would be on this device, whatever tensors stand in for those on it."""
    _THREAD.device = device
    try:
        yield
    finally:
        _THREAD.device = None


def _rewritten_class(stock: type[nn.Module], runners: Mapping[Written, Runner]) -> type:
    key = (stock, *((written.method, written.number, runner) for written, runner in runners.items()))
    kind = _CLASSES.get(key)
    if kind is None:
        by_method: dict[str, dict[Written, Runner]] = {}
        for written, runner in runners.items():
            by_method.setdefault(written.method, {})[written] = runner
        functions = dict(methods_of(stock))
        methods = {name: _rewritten_method(stock, name, functions[name], chosen) for name, chosen in by_method.items()}
        sites = tuple(PatchedSite(w.method, str(w.curve), _bits_of(runner)) for w, runner in runners.items())
        kind = _CLASSES[key] = _class_over(stock, Patched, methods, sites)
    return kind


def _bits_of(runner: Runner) -> int | None:
    return runner.approximation.bits if isinstance(runner, ApproximateExpression) else None


def _rewritten_method(
    stock: type[nn.Module], name: str, function: types.FunctionType, runners: Mapping[Written, Runner]
) -> Callable[..., Any]:
    """The method that stands at `name`, which need not be the function's own name."""
    rewritten, code = calling(function, runners), function.__code__
    defaults, by_keyword = function.__defaults__, function.__kwdefaults__

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Another method may have been put in its place, or its code and defaults exchanged, since it was read.
        if not torch.compiler.is_compiling():
            known = function.__code__ is code and function.__defaults__ is defaults
            known = known and function.__kwdefaults__ is by_keyword and getattr(stock, name) is function
            if not (known and _is_patched(self)):
                return getattr(stock, name)(self, *args, **kwargs)
        return rewritten(self, *args, **kwargs)

    return method


def _deriving_class(below: type[nn.Module], allowed: bool, by_call: bool) -> type:
    """Of a module inside which tensors are derived, or, with `allowed` False, are not.

    Args:
        by_call: somebody has put another forward on this one module, so that the class's is not what is called.
    """
    over = _DERIVING.setdefault(below, weakref.WeakValueDictionary())
    kind = over.get((allowed, by_call))
    if kind is None:
        name = "__call__" if by_call else "forward"
        sites = below._invact_sites if issubclass(below, Patched) else ()
        kind = over[allowed, by_call] = _class_over(
            below, Patched, {name: _deriving_method(below, name, allowed)}, sites
        )
    return kind


def _deriving_method(below: type[nn.Module], name: str, allowed: bool) -> Callable[..., Any]:
    @functools.wraps(getattr(below, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        traced = torch.compiler.is_compiling()
        if traced or is_deriving(allowed) or not may_derive() or not _is_patched(self):
            return users_call(getattr(below, name), self, *args, **kwargs)
        with Deriving(allowed, self):
            return users_call(getattr(below, name), self, *args, **kwargs)

    return method


def _checkpointed_class(below: type[nn.Module], by_call: bool) -> type:
    """Of a block whose forward is run once more in backward instead of keeping what it keeps.

    Args:
        by_call: as of `_deriving_class`.
    """
    if has_own_switch(below):
        return _switched_class(below)
    name = "__call__" if by_call else "forward"
    return _checkpointed(below, name, lambda: {name: _checkpointed_method(below, name)})


def _switched_class(below: type[nn.Module]) -> type:
    """Of a layer of transformers with its switch on, or of the model around it, which makes no cache then."""
    return _checkpointed(
        below, "", lambda: {"gradient_checkpointing": _ON, "_gradient_checkpointing_func": _CHECKPOINT}
    )


def _checkpointed(below: type[nn.Module], how: str, methods: Callable[[], Mapping[str, Any]]) -> type:
    over = _CHECKPOINTED.setdefault(below, weakref.WeakValueDictionary())
    kind = over.get(how)
    if kind is None:
        sites = below._invact_sites if issubclass(below, Patched) else ()
        kind = over[how] = _class_over(below, Patched, {**methods(), "_invact_checkpoints": True}, sites)
    return kind


def has_own_switch(kind: type) -> bool:
    """Whether a module of this class can be checkpointed by an attribute: a layer of transformers can.

    It knows what it must not be given when it is run once more, such as a cache to write to.
    """
    layer = getattr(sys.modules.get("transformers.modeling_layers"), "GradientCheckpointingLayer", None)
    return layer is not None and issubclass(kind, layer)


class _Switch:
    """An attribute that reads as ours whatever the module's own is, which can be set all the same."""

    def __init__(self, value: Callable[[], Any]) -> None:
        self._value = value

    def __set_name__(self, kind: type, name: str) -> None:
        self._name = name  # the same in all classes

    def __get__(self, module: Any, kind: type) -> Any:
        return self._value()

    def __set__(self, module: Any, value: Any) -> None:
        module.__dict__[self._name] = value


def _may_checkpoint() -> bool:
    """Whether there is a backward for which to run a block again, and hooks on what is kept may be set."""
    return torch.is_grad_enabled() and not transforms_active()


def _checkpointed_layer(function: Any, *args: Any) -> Any:
    """What a layer of transformers has its forward run by: `function` holds the layer and its keyword arguments."""
    return _run_checkpointed(None, function, args, {}, held=getattr(function, "keywords", {}))


_ON = _Switch(_may_checkpoint)
_CHECKPOINT = _Switch(lambda: _checkpointed_layer)


def _checkpointed_method(below: type[nn.Module], name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(below, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        method_below = getattr(below, name)
        if not (_may_checkpoint() and _is_patched(self)):
            return users_call(method_below, self, *args, **kwargs)
        return _run_checkpointed(self, functools.partial(method_below, self), args, kwargs, held=kwargs)

    return method


def _run_checkpointed(
    block: nn.Module | None, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], held: Mapping[str, Any]
) -> Any:
    """PyTorch's checkpointing of one call.

    Args:
        block: whose running statistics are to be counted once; None for one that has none.
        held: the keyword arguments that the forward gets, be it that `function` holds them already.
    """
    if torch.compiler.is_compiling():
        return users_call(checkpoint, function, *args, use_reentrant=False, **kwargs)
    contexts = functools.partial(_contexts, block, args, held)
    return users_call(checkpoint, function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


# Whose buffers a forward changes and no gradient depends on in training.
WITH_RUNNING_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _contexts(
    block: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Those of the first and of the second forward of a block that is checkpointed; as of `_run_checkpointed`."""
    # PyTorch looks after tensors that are arguments by position; of others it would take what they have become.
    others = [arg for arg in args if not isinstance(arg, Tensor)], kwargs
    versions = [(leaf, leaf._version) for leaf in tree_leaves(others) if isinstance(leaf, Tensor)]
    return nullcontext(), _second_forward(block, versions)


@contextmanager
def _second_forward(block: nn.Module | None, versions: list[tuple[Tensor, int]]) -> Iterator[None]:
    """In the block batch norms count into copies: the first forward has counted already.

    Raises:
        RuntimeError: an argument was changed in place since the first forward.
    """
    if any(tensor._version != version for tensor, version in versions):
        raise RuntimeError(
            "a block that invact.fit has checkpointed runs once more in backward, and one of its arguments has been "
            "changed in place since it was given. Change a copy of it, or use invact.patch, which checkpoints nothing."
        )
    modules = [] if block is None else block.modules()
    buffers = [m._buffers for m in modules if isinstance(m, WITH_RUNNING_STATISTICS)]
    own = [dict(each) for each in buffers]
    for each in buffers:
        each.update({name: None if buffer is None else buffer.clone() for name, buffer in each.items()})
    try:
        yield
    finally:
        for each, before in zip(buffers, own, strict=True):
            each.update(before)


def _is_patched(module: Any) -> bool:
    """Asked of what calls a method of ours: it may have its own class again."""
    return isinstance(module, Patched)


def _class_over(below: type, first: type[Patched], methods: Mapping[str, Any], sites: tuple[PatchedSite, ...]) -> type:
    """A subclass that looks like the class it is of, made past metaclasses that keep a register."""
    copied = {name: getattr(below, name) for name in ("__module__", "__qualname__", "__doc__")}
    stock = below._invact_stock if issubclass(below, Patched) else below
    names = {**copied, **methods, "_invact_stock": stock, "_invact_below": below, "_invact_sites": sites}
    metaclass = type(below)
    make = abc.ABCMeta.__new__ if issubclass(metaclass, abc.ABCMeta) else type.__new__
    bases = (below,) if issubclass(below, first) else (first, below)
    kind = make(metaclass, below.__name__, bases, names)
    if "forward" in methods:
        _let_it_be_checkpointed(kind)
    return kind


def _let_it_be_checkpointed(kind: type) -> None:
    """A layer of transformers is checkpointed only if `forward` is what `__init_subclass__` of theirs has put there."""
    layer = getattr(sys.modules.get("transformers.modeling_layers"), "GradientCheckpointingLayer", None)
    put_there = vars(layer).get("__init_subclass__") if layer in kind.__mro__ else None
    if put_there is not None:
        put_there.__func__(kind)


def _set_class(module: nn.Module, kind: type) -> None:
    _CLASS.__set__(module, kind)  # past a `__setattr__` of the user's


# --- putting them in and taking them out --------------------------------------------------------------


@dataclass
class Swaps:
    """The modules that `swap_in` patched, each with the class it was given, so that exactly these are taken back."""

    modules: list[tuple[nn.Module, type[Patched]]] = field(default_factory=list)

    def undo(self) -> int:
        """Takes every class of ours off again; returns the number of sites restored."""
        restored = 0
        for module, kind in reversed(self.modules):
            if issubclass(type(module), kind):
                restored += len(kind._invact_sites) - len(getattr(kind._invact_below, "_invact_sites", ()))
                _set_class(module, _class_without(type(module), kind))
        self.modules = []
        return restored


def _class_without(kind: type, ours: type[Patched]) -> type:
    """The class under ours, or that of somebody, such as FSDP, who has put his own on top, over it."""
    if kind is ours:
        below: type = ours._invact_below
        return below
    bases = tuple(_class_without(base, ours) if issubclass(base, ours) else base for base in kind.__bases__)
    names = {name: value for name, value in kind.__dict__.items() if name not in ("__dict__", "__weakref__")}
    if "_invact_below" in names:
        names["_invact_below"] = bases[-1]
    return type.__new__(type(kind), kind.__name__, bases, names)


def swap_in(
    model: nn.Module,
    modules: Mapping[str, Inversion | Approximation],
    expressions: Mapping[str, Mapping[Written, Runner]],
    derives: Mapping[str, bool] = types.MappingProxyType({}),
    norms: Mapping[str, Fusion] = types.MappingProxyType({}),
    checkpointed: Sequence[str] = (),
) -> Swaps:
    """Inverts or approximates, fuses norms, sets hooks, and checkpoints; all of it or, after an error, nothing.

    Args:
        modules: by the path of the module.
        expressions: by the path of the module in whose methods they stand, what runs in their place.
        derives: by the path of the module, whether tensors are derived inside it.
        norms: by the path of the module.
        checkpointed: the paths of blocks.
    """
    swaps = Swaps()
    try:
        for path, how in modules.items():
            module = model.get_submodule(path)
            kind = type(module)
            swapped = _inverted_class(kind, how) if isinstance(how, Inversion) else _approximate_class(kind, how)
            _swap(module, swapped, swaps)
        for path, fusion in norms.items():
            module = model.get_submodule(path)
            _swap(module, _fused_class(type(module), fusion), swaps)
        for path, runners in expressions.items():
            module = model.get_submodule(path)
            _swap(module, _rewritten_class(type(module), runners), swaps)
        for path, allowed in derives.items():
            module = model.get_submodule(path)
            _swap(module, _deriving_class(type(module), allowed, "forward" in vars(module)), swaps)
        for path in checkpointed:
            module = model.get_submodule(path)
            _swap(module, _checkpointed_class(type(module), "forward" in vars(module)), swaps)
        for module in _with_a_switch_around(model, checkpointed):
            _swap(module, _switched_class(type(module)), swaps)
    except BaseException:
        swaps.undo()
        raise
    return swaps


def _with_a_switch_around(model: nn.Module, checkpointed: Sequence[str]) -> Iterator[nn.Module]:
    """The models of transformers around their layers that are checkpointed: a cache would be written to twice."""
    layers = [path for path in checkpointed if has_own_switch(type(model.get_submodule(path)))]
    for path, module in model.named_modules():
        within = f"{path}." if path else ""
        around = not has_own_switch(type(module)) and any(layer.startswith(within) for layer in layers)
        if around and "gradient_checkpointing" in vars(module):
            yield module


def _swap(module: nn.Module, kind: type, swaps: Swaps) -> None:
    _set_class(module, kind)
    swaps.modules.append((module, kind))


def stock_class(module: nn.Module) -> type:
    """The class that a module had before any of ours."""
    kind = type(module)
    return kind._invact_stock if issubclass(kind, Patched) else kind


def is_checkpointed(module: nn.Module) -> bool:
    """Whether one of our classes checkpoints it, or the switch is on that its own has."""
    if isinstance(module, Patched) and module._invact_checkpoints:
        return True
    return has_own_switch(type(module)) and bool(getattr(module, "gradient_checkpointing", False))


def inverted_in(module: nn.Module) -> tuple[str, tuple[PatchedSite, ...]]:
    """The name of the class that a module had, and what is inverted or approximated in it; nothing if it is stock.

    Example:
        >>> inverted_in(nn.GELU())
        ('', ())
    """
    kind = type(module)
    return (kind._invact_stock.__name__, kind._invact_sites) if issubclass(kind, Patched) else ("", ())


def swaps_in(model: nn.Module) -> Swaps:
    """Everything patched in `model`."""
    ours = [(module, kind) for module in model.modules() for kind in reversed(type(module).__mro__)]
    return Swaps([(module, kind) for module, kind in ours if "_invact_below" in vars(kind)])
