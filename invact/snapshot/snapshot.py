"""Everything that Python can reach from a model, noted before a forward pass and put back after it."""

from __future__ import annotations

import array
import collections
import contextvars
import functools
import gc
import itertools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from invact.pytorch.modes import modes_off
from invact.snapshot.named_globals import named_globals, of_library
from invact.snapshot.noted import (
    Noted,
    NotedArray,
    NotedBuffer,
    NotedCell,
    NotedDeque,
    NotedDict,
    NotedEmptyDict,
    NotedList,
    NotedNames,
    NotedObject,
    NotedSet,
    NotedSlots,
    NotedTensor,
)
from invact.snapshot.random_states import generator_of, global_generators

_HOLDS_NOTHING: tuple[Any, ...] = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type(...), type(NotImplemented)),
    *(types.CodeType, types.FrameType, types.TracebackType, types.ModuleType, types.GetSetDescriptorType),
    *(
        types.MemberDescriptorType,
        types.WrapperDescriptorType,
        types.MethodDescriptorType,
        types.ClassMethodDescriptorType,
    ),
    *(*weakref.ProxyTypes, torch.dtype, torch.device, torch.layout, torch.memory_format),
)
# Of the standard library these hold what they are given; others (locks, files, loggers, threads) are left alone.
_HOLDERS = {
    *("argparse", "array", "builtins", "collections", "dataclasses", "enum", "functools", "itertools", "random"),
    *("_thread", "_threading_local", "_weakrefset", "weakref"),  # objects of threads and containers, not locks
}
_BIG = 100_000
"""A container of more items than this is noted, but its items are not looked into."""


@contextmanager
def as_it_was(*roots: Any, tensors: bool = False) -> Iterator[None]:
    """Puts back at the end of the block, however it ends, all that can be reached from `roots`; see `Snapshot`.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> model.seen = [1]
        >>> with as_it_was(model):
        ...     model.seen.append(2)
        ...     model.extra = torch.rand(1)
        >>> model.seen, hasattr(model, "extra")
        ([1], False)
    """
    snapshot = Snapshot(*roots, tensors=tensors)
    try:
        yield
    finally:
        snapshot.put_back()


class Snapshot:
    """The state of all that Python can reach from some objects, and of the generators of random numbers.

    Noted are attributes, classes of objects, containers, numpy arrays, closures and defaults of functions, data of
    classes, and the globals that code which is no library's names. `put_back` writes only where something differs.

    Known limits: how far an iterator has come, objects written in C that do not show what they hold, what another
    thread keeps for itself, locks, files, and what the standard library and torch keep of their own are left alone.

    Args:
        roots: where to begin: a model, its inputs.
        tensors: notes the numbers in parameters as well, which takes a copy of each; of other tensors always.
    """

    def __init__(self, *roots: Any, tensors: bool = False) -> None:
        self._tensors = tensors
        self._noted: list[Noted] = []
        self._seen: dict[int, Any] = {}  # holds what it names, so that no identity is given away meanwhile
        self._kinds: dict[type, _Kind] = {}
        self._waiting: list[Any] = list(roots)
        with modes_off():
            self._noted += global_generators()
            while self._waiting:
                value = self._waiting.pop()
                if id(value) not in self._seen:
                    self._seen[id(value)] = value
                    self._note(value)

    def put_back(self) -> None:
        """Makes everything what it was; an object that cannot be put back does not keep the others from it."""
        errors: list[Exception] = []
        with modes_off():
            for noted in self._noted:
                try:
                    noted.put_back()
                except Exception as error:
                    errors.append(error)
        if errors:
            try:
                raise errors[0]
            finally:
                del errors  # else the traceback would keep all that was noted alive

    def _note(self, value: Any) -> None:
        cls = type(value)
        kind = self._kinds.get(cls)
        if kind is None:
            kind = self._kinds[cls] = _kind_of(cls)
            if not kind.left_alone:
                self._waiting.append(cls)
        if kind.left_alone:
            return
        if kind.dict_of is not None:
            attributes = kind.dict_of.__get__(value)
            self._noted.append(NotedObject(value, cls, kind.dict_of, attributes))
            self._waiting.append(attributes)
        elif kind.changes_class:
            self._noted.append(NotedObject(value, cls, None, None))
        if kind.slots:
            slots = NotedSlots.of(value, kind.slots)
            self._noted.append(slots)
            self._follow(slots.values)
        kind.content(self, value)

    def _follow(self, values: Any) -> None:
        kinds = self._kinds
        for value in values:
            kind = kinds.get(type(value))
            if kind is None or not kind.left_alone:
                self._waiting.append(value)

    # One method for each kind of content.

    def _nothing(self, value: Any) -> None:
        pass

    def _referents(self, value: Any) -> None:
        self._follow(gc.get_referents(value))

    def _dict(self, value: dict[Any, Any]) -> None:
        if not dict.__len__(value):  # most are: the hooks of modules that have none
            self._noted.append(NotedEmptyDict(value))
            return
        if _is_of_a_module_or_class(value):
            return
        noted = NotedDict.of(value)
        self._noted.append(noted)
        if len(noted.keys) <= _BIG:
            self._follow(noted.values)
            self._follow(noted.keys)

    def _list(self, value: list[Any]) -> None:
        noted = NotedList.of(value)
        self._noted.append(noted)
        if len(noted.items) <= _BIG:
            self._follow(noted.items)

    def _tuple(self, value: tuple[Any, ...]) -> None:
        if tuple.__len__(value) <= _BIG:
            self._follow(tuple.__iter__(value))

    def _set(self, value: set[Any]) -> None:
        noted = NotedSet.of(value)
        self._noted.append(noted)
        self._follow(noted.items)

    def _deque(self, value: collections.deque[Any]) -> None:
        noted = NotedDeque.of(value)
        self._noted.append(noted)
        self._follow(noted.items)

    def _buffer(self, value: Any) -> None:
        self._noted.append(NotedBuffer.of(value))

    def _array(self, value: Any) -> None:
        if value.flags.writeable:
            self._noted.append(NotedArray.of(value))
        if value.dtype.hasobject:
            self._follow(value.flat)

    def _cell(self, value: Any) -> None:
        noted = NotedCell.of(value)
        self._noted.append(noted)
        self._follow((noted.content,))

    def _cycle(self, value: itertools.cycle[Any]) -> None:
        for held in gc.get_referents(value):  # an iterator, and a list of its own that must grow as it does
            self._follow(held if type(held) is list else (held,))

    def _weak(self, value: weakref.ref[Any]) -> None:
        self._follow((value(),))

    def _context_variable(self, value: contextvars.ContextVar[Any]) -> None:
        self._follow((value.get(None), *gc.get_referents(value)))  # the latter for its default

    def _of_this_thread(self, value: threading.local) -> None:
        self._waiting.append(value.__dict__)

    def _generator(self, value: Any) -> None:
        noted = generator_of(value)
        if noted is not None:
            self._noted.append(noted)

    def _tensor(self, value: Tensor) -> None:
        # Operations that see no simulated tensor run for real inside a simulated pass: those of a counter, say.
        noted = NotedTensor.of(value, copies=self._tensors or not isinstance(value, nn.Parameter))
        self._noted.append(noted)
        self._follow((noted.hooks,))
        if noted.grad is not None and id(noted.grad) not in self._seen:  # no forward writes its numbers
            self._seen[id(noted.grad)] = noted.grad
            self._noted.append(NotedTensor.of(noted.grad, copies=self._tensors))

    def _built_in(self, value: Any) -> None:
        self._follow((value.__self__,))  # such as the list of `seen.append`

    def _function(self, value: types.FunctionType) -> None:
        noted = NotedSlots.of(value, _OF_FUNCTIONS)
        self._noted.append(noted)
        self._follow((*noted.values, *(value.__closure__ or ())))
        if not of_library(value.__globals__.get("__name__")):
            bindings, values = named_globals(value)
            self._noted += bindings
            self._follow(values)

    def _class(self, value: type) -> None:
        self._waiting += value.__mro__[1:]
        if _is_core(value.__module__):
            return
        attributes = {name: each for name, each in vars(value).items() if not _dunder(name)}
        data = {name: each for name, each in attributes.items() if not _is_code(each)}
        self._noted.append(NotedNames.of_class(value, data))
        self._noted.append(_NotedNewNames(value, frozenset(attributes)))
        if of_library(value.__module__):
            self._follow(data.values())
        else:  # its methods, those like __call__ as well, name globals
            self._follow(each for name, each in vars(value).items() if name not in ("__dict__", "__weakref__"))


@dataclass(slots=True)
class _NotedNewNames:
    """Which attributes a class has: data that it got since is taken from it; a method that it got, another patched."""

    owner: type
    names: frozenset[str]

    def put_back(self) -> None:
        for name in [n for n, each in vars(self.owner).items() if not (_dunder(n) or _is_code(each))]:
            if name not in self.names:
                type.__delattr__(self.owner, name)


@dataclass(frozen=True)
class _Kind:
    """How objects of one class are noted."""

    left_alone: bool
    dict_of: Any = None  # the descriptor of __dict__, past any property of that name
    slots: tuple[Any, ...] = ()
    changes_class: bool = False
    content: Callable[[Snapshot, Any], None] = Snapshot._nothing


_OF_FUNCTIONS = (vars(types.FunctionType)["__defaults__"], vars(types.FunctionType)["__kwdefaults__"])
_CONTENTS: dict[type, Callable[[Snapshot, Any], None]] = {
    dict: Snapshot._dict,
    list: Snapshot._list,
    tuple: Snapshot._tuple,
    set: Snapshot._set,
    collections.deque: Snapshot._deque,
    bytearray: Snapshot._buffer,
    threading.local: Snapshot._of_this_thread,
    contextvars.ContextVar: Snapshot._context_variable,
    itertools.cycle: Snapshot._cycle,
    weakref.ref: Snapshot._weak,
    array.array: Snapshot._buffer,
    types.CellType: Snapshot._cell,
    types.FunctionType: Snapshot._function,
    types.BuiltinFunctionType: Snapshot._built_in,
    type: Snapshot._class,
    Tensor: Snapshot._tensor,
    torch.Generator: Snapshot._generator,
    # It shows its cache, whose inside must not be touched; what it wraps is among its attributes.
    type(functools.lru_cache(lambda: None)): Snapshot._nothing,
}


def _kind_of(cls: type) -> _Kind:
    bases = cls.__mro__
    if issubclass(cls, type):
        return _Kind(False, content=Snapshot._class)
    content = next((_CONTENTS[base] for base in bases if base in _CONTENTS), None)
    if content is None and _draws_random_numbers(bases):
        content = Snapshot._generator
    if content is None and any(base.__module__ == "numpy" and base.__name__ == "ndarray" for base in bases):
        on_disk = any(base.__name__ == "memmap" for base in bases)
        content = Snapshot._nothing if on_disk else Snapshot._array
    if issubclass(cls, torch.optim.Optimizer):  # its states are as large as the model, and no forward touches them
        return _Kind(True)
    if content is None and ((issubclass(cls, _HOLDS_NOTHING) and not _has_dict(cls)) or _is_machinery(cls)):
        return _Kind(True)
    written_in_python = bool(cls.__flags__ & _HEAP_TYPE)
    return _Kind(
        False,
        dict_of=next((vars(base)["__dict__"] for base in bases if _has_own_dict(base)), None),
        slots=tuple(
            member
            for base in bases
            if "__slots__" in vars(base)
            for member in vars(base).values()
            if isinstance(member, types.MemberDescriptorType)
        ),
        changes_class=written_in_python and not of_library(cls.__module__),
        content=content or Snapshot._referents,
    )


_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def _has_dict(cls: type) -> bool:
    return cls.__dictoffset__ != 0 and not issubclass(cls, types.ModuleType)


def _has_own_dict(base: type) -> bool:
    return isinstance(vars(base).get("__dict__"), types.GetSetDescriptorType) and base is not type


def _draws_random_numbers(bases: tuple[type, ...]) -> bool:
    names = {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in bases if base.__module__}
    numpys = {"numpy.Generator", "numpy.BitGenerator", "numpy.RandomState"}
    return not names.isdisjoint({"random.Random", *numpys})


def _is_machinery(cls: type) -> bool:
    """Whether objects of this class belong to Python or PyTorch themselves, rather than to who uses them."""
    module = cls.__module__ if isinstance(cls.__module__, str) else ""
    top = module.partition(".")[0]
    if top in ("ctypes", "_ctypes", "numpy") or module.startswith("torch._"):
        return True
    return (
        top in sys.stdlib_module_names
        and top not in _HOLDERS
        and cls not in (types.SimpleNamespace, types.MappingProxyType)
    )


def _is_core(module: Any) -> bool:
    top = module.partition(".")[0] if isinstance(module, str) else ""
    return top in ("torch", "numpy", "invact") or top in sys.stdlib_module_names


def _is_of_a_module_or_class(value: dict[Any, Any]) -> bool:
    name = dict.get(value, "__name__")
    if isinstance(name, str) and getattr(sys.modules.get(name), "__dict__", None) is value:
        return True
    return dict.__contains__(value, "__module__") and dict.__contains__(value, "__doc__")


def _dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_code(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, type, staticmethod, classmethod, property)) or hasattr(
        type(value), "__get__"
    )
