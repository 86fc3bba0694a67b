"""Activations that are written out in a module's methods, such as `F.gelu(x)` or `x * torch.sigmoid(x)`.

They are found in the source and recognised by what they compute; `rewriting` runs them through a callable of ours.
"""

from __future__ import annotations

import ast
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from invact.recognition.curves import recognise
from invact.recognition.dependencies import Dependencies, Reading, UnseenError
from invact.recognition.dependencies_of_functions import readings_of_value
from invact.recognition.meanings import CONSTANTS, UNKNOWN, Method, method_of
from invact.recognition.pointwise import has_pointwise_name
from invact.recognition.sources import methods_of
from invact.recognition.written_expression import Place, Written, as_lambda


def written_in(module: nn.Module) -> list[Written]:
    """The activations that the methods of `module` compute in expressions.

    Example:
        >>> written_in(nn.TransformerEncoderLayer(8, 2, activation="gelu"))
        [Written(method='_ff_block', number=0, curve=gelu, text='self.activation(…)')]
    """
    found = []
    for name, function in methods_of(type(module)):
        if name in module.__dict__:  # a method that was given to this module alone
            continue
        method = method_of(module, function)
        places = _places_once(method) if method else []
        for number, place in enumerate(places):
            assert method is not None
            # Made for this module, and not kept with the place: what is read once outlives the module.
            computes = _Function(_evaluable(place.node, place.hole, method))
            found.append(Written(name, number, place.curve, place.text, computes, place, _dependencies(place, method)))
    return found


KEPT_PLACES = 64  # a method is read anew for modules in which its names stand for something else
_PLACES: weakref.WeakKeyDictionary[types.FunctionType, dict[tuple[Any, ...], list[Place]]]
_PLACES = weakref.WeakKeyDictionary()


def _places_once(method: Method) -> list[Place]:
    """`_places`, looked for once for all modules in which every name of the method stands for the same."""
    key = method.all_meanings()
    if key is None:
        return _places(method)
    known = _PLACES.setdefault(method.function, {})
    if key not in known:
        if len(known) >= KEPT_PLACES:
            known.clear()
        known[key] = _places(method)
    return known[key]


def _dependencies(place: Place, method: Method) -> Dependencies | None:
    try:
        return Dependencies(_readings(place, method))
    except UnseenError:
        return None


def _readings(place: Place, method: Method) -> Iterator[Reading]:
    """What an expression reads besides its value."""
    inside = set(ast.walk(place.hole))
    seen: set[int] = set()
    for node in ast.walk(place.node):
        if not isinstance(node, (ast.Name, ast.Attribute)) or node in inside:
            continue
        value = method.meaning(node)
        if value is UNKNOWN or value is method.module:
            continue
        if isinstance(value, types.ModuleType):
            continue  # what is read of it stands in a node of its own
        if isinstance(node, ast.Attribute):
            owner = method.meaning(node.value)
            yield from readings_of_value(None if owner is method.module else owner, node.attr, value, seen)
        elif node.id in method.cells:
            yield from readings_of_value(method.cells[node.id], node.id, value, seen)
        else:
            yield from readings_of_value(method.function.__globals__, node.id, value, seen)


def _places(method: Method) -> list[Place]:
    """The outermost recognised expressions of a method, in the order of the source, those in their values included."""
    places: list[Place] = []

    def walk(node: ast.AST) -> None:
        place = _place(node, method) if isinstance(node, (ast.Call, ast.BinOp, ast.UnaryOp)) else None
        if place is not None:
            places.append(place)
            walk(place.hole)
        else:
            for child in ast.iter_child_nodes(node):
                walk(child)

    for statement in method.source.definition.body:
        walk(statement)
    return places


def _place(node: ast.Call | ast.BinOp | ast.UnaryOp, method: Method) -> Place | None:
    """The expression as a function of the one value it is computed of, if that is a known curve."""
    for holes in _possible_holes(node, method):
        if not holes or holes[0] is node or len({ast.dump(hole) for hole in holes}) > 1:
            continue
        if len(holes) > 1 and not isinstance(holes[0], ast.Name):  # a value that is computed twice is two values
            continue
        if any(isinstance(part, ast.Call) and part not in ast.walk(holes[0]) for part in ast.walk(node)):
            curve = recognise(_Function(_evaluable(node, holes[0], method)))
            if curve is not None:
                return Place(node, holes[0], curve)
    return None


def _possible_holes(node: ast.expr, method: Method) -> Iterator[list[ast.expr]]:
    """What an expression may be computed of: `x.exp().relu()` of x, or else of `x.exp()`."""
    yield _holes(node, method)
    yield [part for part in _operands(node, method) or [] if _holes(part, method)]  # the others are constants


def _evaluable(node: ast.expr, hole: ast.expr, method: Method) -> Callable[[Tensor], Tensor]:
    tree = ast.fix_missing_locations(ast.Expression(as_lambda(node, hole)))
    code = compile(tree, method.source.filename, "eval", method.source.flags, dont_inherit=True)
    names = {**method.function.__globals__, **method.contents(), method.source.self_name: method.module}
    function: Callable[[Tensor], Tensor] = eval(code, names)
    return function


class _Function(nn.Module):
    """A function as a module, as recognition takes it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _holes(node: ast.expr, method: Method) -> list[ast.expr]:
    """The parts of an expression that are not elementwise operations on others, nor constants; itself if it is none."""
    parts = _operands(node, method)
    if parts is None:
        return [node]
    return [hole for part in parts for hole in _holes(part, method)]


def _operands(node: ast.expr, method: Method) -> list[ast.expr] | None:
    """What an elementwise operation works on, nothing for a constant, None for anything else."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, (ast.Constant, ast.Name, ast.Attribute)):
        return [] if isinstance(method.meaning(node), CONSTANTS) else None
    if not isinstance(node, ast.Call) or any(keyword.arg is None for keyword in node.keywords):
        return None
    arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
    function = method.meaning(node.func)
    if function is UNKNOWN and isinstance(node.func, ast.Attribute) and has_pointwise_name(node.func.attr):
        return [node.func.value, *arguments]  # x.sigmoid()
    return arguments if method.may_call(function) else None
