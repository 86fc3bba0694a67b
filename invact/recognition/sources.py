"""The source of a method, read only where it is proven to be what runs: compiled again it gives the same code."""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import operator
import types
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

_FUTURE_FLAGS = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


@dataclass(frozen=True)
class Source:
    """A method's syntax tree, proven to be what runs: compiled unchanged it is the method's own code."""

    definition: ast.FunctionDef
    filename: str
    flags: int
    self_name: str
    variables: frozenset[str]
    references: tuple[ast.expr, ...]  # the names and chains of attributes in it, each once, but for its variables


def methods_of(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    """The functions that a class and its bases but `nn.Module` hold as methods, by name."""
    seen = set[str]()
    for base in kind.__mro__:
        for name, value in base.__dict__.items():
            own = base not in (nn.Module, object) and name not in seen and not name.startswith("__")
            if own and isinstance(value, types.FunctionType):
                yield name, value
        seen.update(base.__dict__)


def source_of(function: types.FunctionType) -> Source | None:
    """The source of a method, or None where it is not proven to be what runs: wrapped, edited, made elsewhere."""
    if function not in _SOURCES:
        _SOURCES[function] = _read(function)
    return _SOURCES[function]


# What is kept holds no function, class or cell: they go when their owner lets them go.
_SOURCES: weakref.WeakKeyDictionary[types.FunctionType, Source | None] = weakref.WeakKeyDictionary()


def _read(function: types.FunctionType) -> Source | None:
    code = function.__code__
    if hasattr(function, "__wrapped__") or not _READ_OWN_VARIABLES.isdisjoint(code.co_names):
        return None
    try:
        lines, before = inspect.findsource(function)
        definition = _definition(inspect.getblock(lines[before:]))
        proven = any(
            _is_same_code(code, other) for other in _codes_in("".join(lines), code.co_filename)[_stands_at(code)]
        )
    except (OSError, TypeError, SyntaxError, ValueError, LookupError):  # no source, or not one that stands by itself
        return None
    if not proven or not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return None
    if _has_mangled_names(definition) or _exchanges(definition, definition.args.args[0].arg):
        return None
    ast.increment_lineno(definition, before)
    flags = code.co_flags & _FUTURE_FLAGS
    self_name, variables = definition.args.args[0].arg, frozenset(_variables(code))
    return Source(
        definition=definition,
        filename=code.co_filename,
        flags=flags,
        self_name=self_name,
        variables=variables,
        references=tuple(_references(definition, variables - {self_name})),
    )


_READ_OWN_VARIABLES = frozenset(("locals", "vars", "dir", "eval", "exec"))  # and would see ours


def _definition(block: Sequence[str]) -> ast.stmt:
    """The first statement of some lines, which may be indented; its first line is 1."""
    if not block[0][0].isspace():
        return ast.parse("".join(block)).body[0]
    # Under an `if` and not dedented, which would change strings of several lines.
    around = ast.parse("if True:\n" + "".join(block)).body[0]
    assert isinstance(around, ast.If)
    return ast.increment_lineno(around.body[0], -1)


def cells_of(function: types.FunctionType) -> dict[str, types.CellType]:
    """The closure of a function, by name."""
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


@functools.lru_cache(32)
def _codes_in(text: str, filename: str) -> dict[tuple[str, int], list[types.CodeType]]:
    """Every code in the text of a file, by where it stands. How a call is compiled depends on the file's imports."""
    found: dict[tuple[str, int], list[types.CodeType]] = {}
    waiting = [compile(text, filename, "exec", dont_inherit=True)]
    while waiting:
        code = waiting.pop()
        found.setdefault(_stands_at(code), []).append(code)
        waiting += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return found


def _stands_at(code: types.CodeType) -> tuple[str, int]:
    return code.co_name, code.co_firstlineno


_COMPARED = (
    *("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount"),
    *("co_posonlyargcount", "co_kwonlyargcount", "co_name", "co_exceptiontable"),
)


def _is_same_code(one: types.CodeType, other: types.CodeType) -> bool:
    """Whether two codes do the same, wherever they stand."""
    flags = (one.co_flags ^ other.co_flags) & ~inspect.CO_NESTED
    if flags or any(getattr(one, name, None) != getattr(other, name, None) for name in _COMPARED):
        return False
    return len(one.co_consts) == len(other.co_consts) and all(
        _is_same_code(a, b) if isinstance(a, types.CodeType) and isinstance(b, types.CodeType) else _is_same(a, b)
        for a, b in zip(one.co_consts, other.co_consts, strict=True)
    )


def _is_same(one: object, other: object) -> bool:
    return type(one) is type(other) and repr(one) == repr(other)  # 0.0 is not -0.0, and NaN is NaN


def _references(definition: ast.FunctionDef, variables: frozenset[str]) -> list[ast.expr]:
    """The names and chains of attributes that may stand for something before the method runs, each once."""
    found = {_chain(node): node for node in ast.walk(definition) if isinstance(node, (ast.Name, ast.Attribute))}
    return [node for chain, node in found.items() if chain and chain[0] not in variables]


def _chain(node: ast.expr) -> tuple[str, ...]:
    """`a.b.c` as its parts; nothing where it begins with anything but a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return (node.id, *reversed(parts)) if isinstance(node, ast.Name) else ()


def _has_mangled_names(tree: ast.AST) -> bool:
    names = (node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in ast.walk(tree))
    return any(name.startswith("__") and not name.endswith("__") for name in names)


def _exchanges(definition: ast.FunctionDef, self_name: str) -> bool:
    """Whether `self` becomes something else in a method or in a function in it, or any name does in a class in it."""
    nodes = list(ast.walk(definition))
    arguments = [node.arg for node in nodes if isinstance(node, ast.arg)]
    names = (node for node in nodes if isinstance(node, ast.Name) and node.id == self_name)
    exchanged = any(not isinstance(node.ctx, ast.Load) for node in names)
    return exchanged or arguments.count(self_name) > 1 or any(isinstance(node, ast.ClassDef) for node in nodes)


def _variables(code: types.CodeType) -> Iterator[str]:
    """The names that some code, or a function in it, has for itself."""
    yield from code.co_varnames + code.co_cellvars
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _variables(const)
