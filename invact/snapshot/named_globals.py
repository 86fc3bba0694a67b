"""The globals that a function's code names: what it may read, change or bind anew."""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterator
from typing import Any

from invact.snapshot.libraries import of_library_itself
from invact.snapshot.noted import MISSING
from invact.snapshot.noted_names import NotedNames

_BINDS = {dis.opmap[name] for name in ("STORE_GLOBAL", "DELETE_GLOBAL")}
_SETS_ATTRIBUTES = {dis.opmap[name] for name in ("STORE_ATTR", "DELETE_ATTR")}
_NO_STATE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)


def named_globals(function: types.FunctionType) -> tuple[list[NotedNames], list[Any]]:
    """The names that `function` may bind anew, and the objects that it reaches by a name.

    Functions, classes and modules of libraries are left out: what they hold is not the user's.
    """
    namespace = function.__globals__
    bindings: list[NotedNames] = []
    values: list[Any] = []
    for code in _with_nested(function.__code__):
        names = code.co_names
        if "globals" in names:  # it may bind any
            names = tuple(name for name in namespace if not name.startswith("__"))
            bindings.append(NotedNames.of_globals(namespace, _stateful(namespace, names)))
        elif _has(code, _BINDS):
            bound = {each.argval for each in dis.get_instructions(code) if each.opcode in _BINDS}
            bindings.append(NotedNames.of_globals(namespace, bound))
        for name in names:
            # `import settings` inside a function names a module that is no global
            value = namespace.get(name, sys.modules.get(name))
            if not isinstance(value, types.ModuleType):
                values.append(value)
            elif not of_library_itself(value):
                inside = vars(value)
                found = [each for each in code.co_names if each in inside]
                values += [inside[each] for each in found]
                if _has(code, _SETS_ATTRIBUTES):
                    bindings.append(NotedNames.of_globals(inside, _stateful(inside, found)))
    return bindings, [value for value in values if not (isinstance(value, _NO_STATE) and of_library_itself(value))]


def _with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_nested(constant)


def _has(code: types.CodeType, operations: set[int]) -> bool:
    return not operations.isdisjoint(code.co_code[::2])


def _stateful(namespace: dict[str, Any], names: Any) -> list[str]:
    return [name for name in names if not isinstance(namespace.get(name, MISSING), _NO_STATE)]
