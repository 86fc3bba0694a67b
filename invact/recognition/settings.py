"""What an activation computes with besides its input, and whether that is still what it was.

A slope may be annealed, a constant in a closure or a file may change. What was recognised as a curve is that curve only
as long as everything that its code reads is the same.
"""

from __future__ import annotations

import builtins
import dis
import enum
import functools
import itertools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
_LIBRARIES = ("torch", "math", "numpy")  # whoever exchanges what these hold changes PyTorch itself
EVERY_MODULE_HAS = frozenset(nn.Module().__dict__)
_GONE = object()


class UnseenError(Exception):
    """The code reads something that could change without being noticed."""


class Reading:
    """One value that code reads, and where: `owner` is None for the module itself."""

    __slots__ = ("name", "owner", "value")

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reading):
            return NotImplemented
        return (self.owner is other.owner and self.name == other.name) and _same(self.value, other.value)

    def __hash__(self) -> int:
        return hash((id(self.owner), self.name))

    def now(self, module: nn.Module) -> Any:
        """What stands there at present."""
        if self.owner is None:
            return _without_self(module.__dict__.get(self.name, _GONE), module)
        if isinstance(self.owner, types.CellType):
            return _contents(self.owner)
        if isinstance(self.owner, dict):
            return self.owner.get(self.name, _GONE)
        return getattr(self.owner, self.name, _GONE)


class Settings:
    """Everything that some code reads besides its arguments. Equal ones mean the same computation.

    Example:
        >>> act = nn.LeakyReLU(0.3)
        >>> settings = settings_of_module(act)
        >>> settings.unchanged(act)
        True
        >>> act.negative_slope = 0.01
        >>> settings.unchanged(act)
        False
    """

    __slots__ = ("_absent", "_attributes", "_can_be_traced", "readings")

    def __init__(self, readings: Iterator[Reading]) -> None:
        self.readings = tuple(dict.fromkeys(readings))
        own = [reading for reading in self.readings if reading.owner is None]
        self._attributes = tuple((reading.name, reading.value) for reading in own if reading.value is not _GONE)
        self._absent = tuple(reading.name for reading in own if reading.value is _GONE)
        # torch.compile watches attributes by itself; of what stands elsewhere only code is taken not to change
        self._can_be_traced = all(_is_code(reading) for reading in self.readings if reading.owner is not None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and self.readings == other.readings

    def __hash__(self) -> int:
        return hash(self.readings)

    def unchanged(self, module: nn.Module) -> bool:
        """Whether all of it is what it was, for a module of the same class as the one that was read."""
        if torch.compiler.is_compiling():
            as_set = all(getattr(module, name) == value for name, value in self._attributes)
            # that it was asked for makes torch.compile watch whether it stands on the instance later
            absent = all(hasattr(module, name) and name not in module.__dict__ for name in self._absent)
            return self._can_be_traced and as_set and absent
        for reading in self.readings:
            now = reading.now(module)
            if now is not reading.value and not _same(now, reading.value):
                return False
        return True


def settings_of_module(module: nn.Module) -> Settings:
    """What the methods of a module read.

    Raises:
        UnseenError: they read something that can change without being noticed.
    """
    return Settings(_readings_of_module(module))


def _readings_of_module(module: nn.Module) -> Iterator[Reading]:
    kind, seen = type(module), set[int]()
    functions, attributes = _reached_from_forward(module)
    if attribute_access_is_its_own(kind) or "__dict__" in attributes:
        raise UnseenError("__dict__")
    yield Reading(kind, "forward", kind.forward)
    for function in functions:
        yield from readings_of_function(function, seen, own=kind)
    for name in sorted(attributes - EVERY_MODULE_HAS - {"forward"}):
        of_class = static_attribute(kind, name)
        if name in module.__dict__ and not hasattr(of_class, "__set__"):
            yield from readings_of_value(None, name, _without_self(module.__dict__[name], module), seen, kind)
        elif of_class is not _GONE:
            yield Reading(None, name, _GONE)  # nor put on the instance later
            if isinstance(of_class, _READ_BY_CODE):
                yield Reading(kind, name, getattr(kind, name))
            elif hasattr(of_class, "__get__"):
                raise UnseenError(name)
            else:
                yield from readings_of_value(kind, name, of_class, seen)


_READ_BY_CODE = (types.FunctionType, property, staticmethod, classmethod)


def attribute_access_is_its_own(kind: type) -> bool:
    """Whether what an attribute of a module gives is up to code of the author's."""
    of_module: Any = nn.Module.__getattr__
    of_object: Any = object.__getattribute__
    own_getattr = getattr(kind, "__getattr__", None) is not of_module
    return own_getattr or kind.__getattribute__ is not of_object


def static_attribute(kind: type, name: str) -> Any:
    """What the author's classes hold at `name`, descriptors as they are."""
    base = next((base for base in kind.__mro__ if name in vars(base)), object)
    return _GONE if base in (nn.Module, object) else vars(base)[name]


def _own_classes(kind: type) -> Iterator[type]:
    return (base for base in kind.__mro__ if base not in (nn.Module, object))  # mixins may come after `nn.Module`


def _without_self(value: Any, module: nn.Module) -> Any:
    """A method of a module that is an attribute of it as well, by its function: what is read holds no module."""
    return value.__func__ if isinstance(value, types.MethodType) and value.__self__ is module else value


def _reached_from_forward(module: nn.Module) -> tuple[list[types.FunctionType], set[str]]:
    """The functions of a module that its forward may call, and the names of all attributes that they read."""
    functions: list[types.FunctionType] = []
    names, waiting = set[str](), ["forward"]
    while waiting:
        name = waiting.pop()
        own = _without_self(module.__dict__.get(name), module)
        for value in (own, *(vars(base).get(name) for base in _own_classes(type(module)))):  # `super()` may be asked
            function = getattr(value, "fget" if isinstance(value, property) else "__func__", value)
            if isinstance(function, types.FunctionType):
                functions.append(function)
                found = _names(function.__code__, "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
                waiting += sorted(found - names)
                names |= found
    return functions, names


def readings_of_function(
    function: types.FunctionType, seen: set[int], own: type | None = None, keeps: bool = False
) -> Iterator[Reading]:
    """What a function reads of its closure and its file, and the functions that it calls by name.

    Args:
        function: the function.
        seen: the functions that were read already.
        own: the class that it is a method of, which it may name.
        keeps: it may set attributes, as an autograd function does to its context.

    Raises:
        UnseenError: it reads what can change unseen, or does something besides computing.
    """
    if id(function) in seen:
        return
    seen.add(id(function))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__" and (value := _contents(cell)) is not _GONE:
            yield from readings_of_value(cell, name, value, seen, own)
    if (function.__module__ or "").partition(".")[0] in _LIBRARIES:
        return  # PyTorch's own files hold nothing that changes
    if _has_effects(function.__code__, keeps):
        raise UnseenError(function.__name__)
    yield Reading(function, "__code__", function.__code__)
    yield Reading(function, "__defaults__", function.__defaults__)
    for value in function.__defaults__ or ():
        yield from (r for r in readings_of_value(None, "__defaults__", value, seen) if r.owner is not None)
    yield Reading(function, "__kwdefaults__", function.__kwdefaults__)
    for name, value in (function.__kwdefaults__ or {}).items():
        yield from readings_of_value(function.__kwdefaults__, name, value, seen)
    for name in sorted(_names(function.__code__, "LOAD_GLOBAL", "LOAD_NAME")):
        if name in function.__globals__:
            yield from readings_of_value(function.__globals__, name, function.__globals__[name], seen, own)
        elif not _is_harmless_builtin(getattr(builtins, name, None)):
            raise UnseenError(name)


def _has_effects(code: types.CodeType, keeps: bool) -> bool:
    """Whether some code changes anything but its own variables, or imports what is not known."""
    if not keeps and _names(code, "STORE_ATTR", "DELETE_ATTR"):
        return True
    imported = {name.partition(".")[0] for name in _names(code, "IMPORT_NAME")}
    outside = _names(code, "STORE_DEREF", "DELETE_DEREF") & set(code.co_freevars)
    return bool(outside or imported - set(_LIBRARIES) or _names(code, "STORE_GLOBAL", "DELETE_GLOBAL"))


_HARMLESS = (abs, all, any, callable, divmod, isinstance, issubclass, len, max, min, pow, repr, round, sorted, sum)


def _is_harmless_builtin(value: Any) -> bool:
    return isinstance(value, type) or value in _HARMLESS


def readings_of_value(owner: Any, name: str, value: Any, seen: set[int], own: type | None = None) -> Iterator[Reading]:
    """That `value` stands at `name`, and what a function that stands there reads itself.

    Raises:
        UnseenError: the value is something that can change in itself, or the function does more than compute.
    """
    if isinstance(value, types.ModuleType):
        if value.__name__.partition(".")[0] not in _LIBRARIES:
            raise UnseenError(name)  # what it holds may change
        return
    if isinstance(value, type):
        yield Reading(owner, name, value)
        if own is None or not issubclass(own, value):
            yield from _readings_of_class(value, seen)
    elif _is_atom(value):
        yield Reading(owner, name, value)
    elif isinstance(value, functools.partial):
        yield Reading(owner, name, value)
        for part in (value.func, *value.args):
            yield from (r for r in readings_of_value(None, name, part, seen) if r.owner is not None)
        for keyword, part in value.keywords.items():
            yield from readings_of_value(value.keywords, keyword, part, seen)
    elif isinstance(value, types.FunctionType):
        yield Reading(owner, name, value)
        yield from readings_of_function(value, seen)
    elif isinstance(value, types.MethodType) and isinstance(value.__self__, type):
        yield Reading(owner, name, value)
        yield from _readings_of_class(value.__self__, seen)
    elif _is_fixed_callable(value):
        yield Reading(owner, name, value)
    else:
        raise UnseenError(name)


def _readings_of_class(kind: type, seen: set[int]) -> Iterator[Reading]:
    """What an autograd function of the author's reads; other classes of his may hold anything."""
    home = kind.__module__.partition(".")[0]
    if home in (*_LIBRARIES, "builtins", "typing") or issubclass(kind, enum.Enum) or id(kind) in seen:
        return
    if not issubclass(kind, torch.autograd.Function):
        raise UnseenError(kind.__name__)
    seen.add(id(kind))
    for base in itertools.takewhile(lambda base: base is not torch.autograd.Function, kind.__mro__):
        for name, value in vars(base).items():
            function = getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType):
                yield Reading(base, name, getattr(base, name))
                yield from readings_of_function(function, seen, own=kind, keeps=True)
            elif not name.startswith("__"):
                yield from readings_of_value(base, name, value, seen)


def _is_code(reading: Reading) -> bool:
    no_defaults = isinstance(reading.owner, types.FunctionType) and not reading.value
    return callable(reading.value) or isinstance(reading.value, types.CodeType) or no_defaults


def _is_fixed_callable(value: Any) -> bool:
    """Such as the functions of `torch.nn.functional` that are no Python functions, or an operator of `torch.ops`."""
    if isinstance(value, types.BuiltinFunctionType):
        if value.__self__ is builtins:
            return _is_harmless_builtin(value)
        return value.__self__ is None or isinstance(value.__self__, (types.ModuleType, type))  # not `[].append`
    return callable(value) and not isinstance(value, nn.Module) and type(value).__module__.partition(".")[0] == "torch"


def _is_atom(value: Any) -> bool:
    return isinstance(value, _ATOMS) or (isinstance(value, (tuple, frozenset)) and all(map(_is_atom, value)))


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and (_is_atom(one) or callable(one)) and bool(one == other))


def _contents(cell: types.CellType) -> Any:
    """What a cell of a closure holds, or `_GONE`."""
    try:
        return cell.cell_contents
    except ValueError:  # nothing was put there yet, or it was deleted
        return _GONE


def _names(code: types.CodeType, *operations: str) -> set[str]:
    """The names that some code, and the functions that it makes, use in these operations."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    found = {str(step.argval) for step in dis.get_instructions(code) if step.opname in operations}
    return found.union(*(_names(each, *operations) for each in inner))
