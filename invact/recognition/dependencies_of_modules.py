"""What the methods of a module read, from its forward on: attributes, and what its functions read elsewhere."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from invact.recognition.dependencies import GONE, Dependencies, Reading, UnseenError, without_self
from invact.recognition.dependencies_of_functions import names_in, readings_of_function, readings_of_value

EVERY_MODULE_HAS = frozenset(nn.Module().__dict__)


def dependencies_of_module(module: nn.Module) -> Dependencies:
    """What the methods of a module read.

    Raises:
        UnseenError: they read something that can change without being noticed.
    """
    return Dependencies(_readings_of_module(module))


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
            yield from readings_of_value(None, name, without_self(module.__dict__[name], module), seen, kind)
        elif of_class is not GONE:
            yield Reading(None, name, GONE)  # nor put on the instance later
            if isinstance(of_class, _READ_BY_CODE):
                yield Reading(kind, name, getattr(kind, name))
            elif hasattr(of_class, "__get__"):
                raise UnseenError(name)
            else:
                yield from readings_of_value(kind, name, of_class, seen)


_READ_BY_CODE = (types.FunctionType, property, staticmethod, classmethod)


def _reached_from_forward(module: nn.Module) -> tuple[list[types.FunctionType], set[str]]:
    """The functions of a module that its forward may call, and the names of all attributes that they read."""
    functions: list[types.FunctionType] = []
    names, waiting = set[str](), ["forward"]
    while waiting:
        name = waiting.pop()
        own = without_self(module.__dict__.get(name), module)
        for value in (own, *(vars(base).get(name) for base in _own_classes(type(module)))):  # `super()` may be asked
            function = getattr(value, "fget" if isinstance(value, property) else "__func__", value)
            if isinstance(function, types.FunctionType):
                functions.append(function)
                found = names_in(function.__code__, "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
                waiting += sorted(found - names)
                names |= found
    return functions, names


def attribute_access_is_its_own(kind: type) -> bool:
    """Whether what an attribute of a module gives is up to code of the author's."""
    of_module: Any = nn.Module.__getattr__
    of_object: Any = object.__getattribute__
    own_getattr = getattr(kind, "__getattr__", None) is not of_module
    return own_getattr or kind.__getattribute__ is not of_object


def static_attribute(kind: type, name: str) -> Any:
    """What the author's classes hold at `name`, descriptors as they are."""
    base = next((base for base in kind.__mro__ if name in vars(base)), object)
    return GONE if base in (nn.Module, object) else vars(base)[name]


def _own_classes(kind: type) -> Iterator[type]:
    return (base for base in kind.__mro__ if base not in (nn.Module, object))  # mixins may come after `nn.Module`
