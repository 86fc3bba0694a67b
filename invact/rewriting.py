"""Methods of one module compiled anew from their own source, with expressions in them run by callables of ours.

No other module, operation or function is touched.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import operator
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from torch import Tensor, nn

from invact.kernels import Curve

Runner = Callable[[nn.Module, Callable[[Tensor], Tensor], Tensor], Tensor]
"""Called in an expression's place as `runner(module, original, x)`, where `original(x)` is the expression."""

_FUTURE_FLAGS = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
_HOLE = "__invact_x"
_RUNNERS = "__invact_runners"


@dataclass(frozen=True)
class Written:
    """One expression in one method that computes a curve of one value.

    Attributes:
        method: the method's name.
        number: which of the method's recognised expressions, from 0.
        curve: what it computes.
        text: the expression as written, with "…" for the value if that is an expression itself.
        computes: a module that computes it.
        place: where it stands in the method's syntax tree.
    """

    method: str
    number: int
    curve: Curve
    text: str
    computes: nn.Module = field(repr=False, compare=False)
    place: Place = field(repr=False, compare=False)


@dataclass(frozen=True)
class Place:
    """An expression that computes `curve` of the value that `hole` gives."""

    node: ast.expr
    hole: ast.expr
    curve: Curve

    @property
    def text(self) -> str:
        hole = self.hole if isinstance(self.hole, ast.Name) else ast.Name("…")
        return ast.unparse(_with_hole(self.node, self.hole, hole))


def install(module: nn.Module, runners: Mapping[Written, Runner]) -> None:
    """Makes `module` call each runner in place of its expression; `uninstall` undoes it."""
    by_method: dict[str, dict[Written, Runner]] = {}
    for written, runner in runners.items():
        by_method.setdefault(written.method, {})[written] = runner
    methods = dict(methods_of(type(module)))
    functions = {name: _calling(methods[name], chosen) for name, chosen in by_method.items()}
    for name, function in functions.items():
        module.__dict__[name] = types.MethodType(function, module)


def uninstall(module: nn.Module) -> int:
    """Gives `module` its class's methods back; how many expressions that restores."""
    count = len(runners_in(module))
    methods = dict(methods_of(type(module)))
    for name, function in _rewritten_in(module).items():
        if name in methods:
            del module.__dict__[name]
        else:  # a wrapper, such as accelerate's, has put it by and goes on calling it
            runners = getattr(function, _RUNNERS)
            runners.update(dict.fromkeys(runners, _as_written))
    return count


def runners_in(module: nn.Module) -> list[Runner]:
    """The runners that `install` put into `module`."""
    functions = {id(function): function for function in _rewritten_in(module).values()}.values()
    runners = [runner for function in functions for runner in getattr(function, _RUNNERS).values()]
    return [runner for runner in runners if runner is not _as_written]


def _rewritten_in(module: nn.Module) -> dict[str, Callable[..., Any]]:
    methods = {name: value.__func__ for name, value in module.__dict__.items() if isinstance(value, types.MethodType)}
    return {name: function for name, function in methods.items() if hasattr(function, _RUNNERS)}


def _as_written(module: nn.Module, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return original(x)


# --- reading the source -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A method's syntax tree, and where its names lead."""

    definition: ast.FunctionDef
    filename: str
    flags: int
    self_name: str
    variables: frozenset[str]
    cells: Mapping[str, Any]
    names: dict[str, Any]  # the globals of the file
    references: tuple[ast.expr, ...]  # the names and chains of attributes in it, each once


def methods_of(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    seen = set()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            break
        for name, value in base.__dict__.items():
            if isinstance(value, types.FunctionType) and name not in seen and not name.startswith("__"):
                seen.add(name)
                yield name, value


@functools.cache
def source_of(function: types.FunctionType) -> Source | None:
    inner = inspect.unwrap(function)
    if not isinstance(inner, types.FunctionType):
        return None
    try:
        lines, first = inspect.getsourcelines(inner)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        cells = {
            name: cell.cell_contents
            for name, cell in zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True)
        }
    except (OSError, TypeError, SyntaxError, ValueError):  # no source, or not one that stands by itself
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args or _has_mangled_names(definition):
        return None
    ast.increment_lineno(tree, first - 1)
    code = inner.__code__
    return Source(
        definition=definition,
        filename=code.co_filename,
        flags=code.co_flags & _FUTURE_FLAGS,
        self_name=definition.args.args[0].arg,
        variables=frozenset(code.co_varnames + code.co_cellvars),
        cells=cells,
        names=inner.__globals__,
        references=tuple({ast.dump(node): node for node in ast.walk(definition) if _is_reference(node)}.values()),
    )


def _is_reference(node: ast.AST) -> TypeGuard[ast.expr]:
    return isinstance(node, (ast.Name, ast.Attribute))


def _has_mangled_names(tree: ast.AST) -> bool:
    names = (node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in ast.walk(tree))
    return any(name.startswith("__") and not name.endswith("__") for name in names)


# --- writing the method anew --------------------------------------------------------------------------


def can_be_rewritten(function: types.FunctionType, places: list[Place]) -> bool:
    try:
        _factory(function, tuple(places))
    except Exception:  # a decorator or a default that does not stand a second time
        return False
    return True


def _calling(function: types.FunctionType, runners: Mapping[Written, Runner]) -> types.FunctionType:
    """The method with each expression replaced by `runner(self, lambda x: expression, value)`."""
    make = _factory(function, tuple(written.place for written in runners))
    numbered = dict(enumerate(runners.values()))
    made = make(numbered)
    setattr(made, _RUNNERS, numbered)
    return made


@functools.cache
def _factory(
    function: types.FunctionType, places: tuple[Place, ...]
) -> Callable[[dict[int, Runner]], types.FunctionType]:
    """Makes the method anew for given runners; compiled once for all modules of a class."""
    source = source_of(function)
    assert source is not None
    definition = copy.deepcopy(source.definition)
    _Rewriter(source.self_name, places).visit(definition)
    # Cells become arguments of a function around it; `__class__` among them, so that super() works.
    factory = ast.parse(f"def factory({', '.join([_RUNNERS, *source.cells])}):\n    return {definition.name}").body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.body.insert(0, definition)
    tree = ast.fix_missing_locations(ast.Module([factory], type_ignores=[]))
    made: dict[str, Any] = {}
    exec(compile(tree, source.filename, "exec", source.flags, dont_inherit=True), source.names, made)
    make = functools.partial(made["factory"], **source.cells)
    make({})  # the decorators and defaults of the method run here
    return make


class _Rewriter(ast.NodeTransformer):
    def __init__(self, self_name: str, places: tuple[Place, ...]) -> None:
        self._self_name = self_name
        self._places = {_position(place.node): (number, place) for number, place in enumerate(places)}

    def visit(self, node: ast.AST) -> ast.AST:
        number, place = self._places.get(_position(node), (None, None))
        if number is None or place is None:
            return self.generic_visit(node)
        runner = ast.Subscript(ast.Name(_RUNNERS, ast.Load()), ast.Constant(number), ast.Load())
        value = self.visit(copy.deepcopy(place.hole))
        assert isinstance(value, ast.expr)
        arguments = [ast.Name(self._self_name, ast.Load()), as_lambda(place.node, place.hole), value]
        return ast.copy_location(ast.Call(runner, arguments, []), node)


def _position(node: ast.AST) -> tuple[Any, ...]:
    place = (getattr(node, name, None) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset"))
    return (type(node), *place)


def as_lambda(node: ast.expr, hole: ast.expr) -> ast.Lambda:
    arguments = ast.arguments([], [ast.arg(_HOLE)], None, [], [], None, [])
    return ast.Lambda(arguments, _with_hole(node, hole, ast.Name(_HOLE, ast.Load())))


def _with_hole(node: ast.expr, hole: ast.expr, replacement: ast.expr) -> ast.expr:
    """A copy of `node` with `replacement` wherever `hole` stands."""
    wanted = ast.dump(hole)

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return replacement if ast.dump(node) == wanted else self.generic_visit(node)

    replaced = Replace().visit(copy.deepcopy(node))
    assert isinstance(replaced, ast.expr)
    return replaced
