"""A method compiled anew from its own source, with expressions in it run by callables of ours.

Only where the source is proven to be what runs. No module, operation or function is touched.
"""

from __future__ import annotations

import ast
import copy
import functools
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from invact.recognition.sources import cells_of, source_of
from invact.recognition.written_expression import Place, Written, as_lambda

Runner = Callable[[nn.Module, Callable[[Tensor], Tensor], Tensor], Tensor]
"""Called in an expression's place as `runner(module, original, x)`, where `original(x)` is the expression."""

_RUNNERS = "__invact_runners__"


def calling(function: types.FunctionType, runners: Mapping[Written, Runner]) -> types.FunctionType:
    """The method with each expression replaced by `runner(self, lambda x: expression, value)`.

    Its globals, defaults and closure cells are those of `function` itself.
    """
    code = _rewritten(function, tuple(written.place for written in runners))
    cells = {**cells_of(function), _RUNNERS: types.CellType(dict(enumerate(runners.values())))}
    closure = tuple(cells[name] for name in code.co_freevars)
    made = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    functools.update_wrapper(made, function)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


# By where the expressions and their values stand, of which a method has few, and not by their curves: a slope that
# changes between plans would leave one more code at each. The nodes are those of the one tree of the method's source.
_REWRITTEN: weakref.WeakKeyDictionary[types.FunctionType, dict[tuple[tuple[ast.expr, ast.expr], ...], types.CodeType]]
_REWRITTEN = weakref.WeakKeyDictionary()


def _rewritten(function: types.FunctionType, places: tuple[Place, ...]) -> types.CodeType:
    """Compiled once for all modules of a class."""
    codes = _REWRITTEN.setdefault(function, {})
    standing = tuple((place.node, place.hole) for place in places)
    if standing not in codes:
        source = source_of(function)
        assert source is not None
        definition = copy.deepcopy(source.definition)
        _Rewriter(source.self_name, places).visit(definition)
        free = [*function.__code__.co_freevars, _RUNNERS]
        codes[standing] = _compiled(definition, source.filename, source.flags, free)
    return codes[standing]


class _Rewriter(ast.NodeTransformer):
    """Puts a call of the runner with its number in the place of each expression, also of those within the values."""

    def __init__(self, self_name: str, places: tuple[Place, ...]) -> None:
        self._self_name = self_name
        self._numbered = {_position(place.node): (number, place) for number, place in enumerate(places)}

    def visit(self, node: ast.AST) -> ast.AST:
        number, place = self._numbered.get(_position(node), (None, None))
        if number is None or place is None:
            return self.generic_visit(node)
        runner = ast.Subscript(ast.Name(_RUNNERS, ast.Load()), ast.Constant(number), ast.Load())
        value = self.visit(copy.deepcopy(place.hole))
        assert isinstance(value, ast.expr)
        arguments = [ast.Name(self._self_name, ast.Load()), as_lambda(place.node, place.hole), value]
        return ast.copy_location(ast.Call(runner, arguments, []), node)


def _position(node: ast.AST) -> tuple[Any, ...]:
    """Equal for a node and its copy."""
    lines_and_columns = (getattr(node, name, None) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset"))
    return (type(node), *lines_and_columns)


def _compiled(definition: ast.FunctionDef, filename: str, flags: int, free: Sequence[str]) -> types.CodeType:
    """The code of a function whose definition stands where the names `free` are variables of a function around it.

    Nothing is run: neither decorators nor defaults, which the function that is replaced has already.
    """
    bare = copy.copy(definition)
    bare.decorator_list = []
    around = ast.parse(f"def around({', '.join(free)}):\n    pass").body[0]
    assert isinstance(around, ast.FunctionDef)
    around.body = [bare]
    tree = ast.fix_missing_locations(ast.Module([around], type_ignores=[]))
    code: types.CodeType = compile(tree, filename, "exec", flags, dont_inherit=True)
    for name in ("around", definition.name):
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
    return code
