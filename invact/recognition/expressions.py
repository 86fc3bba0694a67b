"""Activations that are written out in a module's methods, such as `F.gelu(x)` or `x * torch.sigmoid(x)`.

They are found in the source and recognised by what they compute; `rewriting` runs them through a callable of ours.
"""

from __future__ import annotations

import ast
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from invact.recognition.curves import recognise
from invact.recognition.read_by_functions import readings_of_value
from invact.recognition.read_by_modules import attribute_access_is_its_own, static_attribute
from invact.recognition.settings import Reading, Settings, UnseenError
from invact.recognition.sources import Source, cells_of, methods_of, source_of
from invact.recognition.written import Place, Written, as_lambda

# What an activation may be built of: torch functions and tensor methods that work element by element.
# fmt: off
_POINTWISE = frozenset(
    [
        "abs",
        "absolute",
        "add",
        "celu",
        "celu_",
        "clamp",
        "clamp_",
        "clamp_max",
        "clamp_min",
        "clamp_min_",
        "clip",
        "clip_",
        "div",
        "divide",
        "elu",
        "elu_",
        "erf",
        "erfc",
        "exp",
        "float",
        "gelu",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "hardtanh_",
        "leaky_relu",
        "leaky_relu_",
        "log",
        "log1p",
        "log_sigmoid",
        "logaddexp",
        "max",
        "maximum",
        "min",
        "minimum",
        "mish",
        "mul",
        "multiply",
        "neg",
        "negative",
        "pow",
        "reciprocal",
        "relu",
        "relu6",
        "relu_",
        "rsqrt",
        "selu",
        "selu_",
        "sigmoid",
        "sigmoid_",
        "silu",
        "softplus",
        "softsign",
        "special_erf",
        "special_erfc",
        "special_expit",
        "special_ndtr",
        "sqrt",
        "square",
        "sub",
        "subtract",
        "tanh",
        "tanh_",
        "threshold",
        "threshold_",
        "to",
        "true_divide",
        "where",
        "zeros_like",
    ]
)
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype)


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
        method = _method(function, module)
        places = _places_once(method) if method else []
        for number, place in enumerate(places):
            assert method is not None
            # Made for this module, and not kept with the place: what is read once outlives the module.
            computes = _Function(_evaluable(place.node, place.hole, method))
            found.append(Written(name, number, place.curve, place.text, computes, place, _settings(place, method)))
    return found


@dataclass(frozen=True)
class _Method:
    """A method's source, and what its names stand for in one module."""

    function: types.FunctionType
    source: Source
    module: nn.Module
    cells: dict[str, types.CellType]


def _method(function: types.FunctionType, module: nn.Module) -> _Method | None:
    source = source_of(function)
    return None if source is None else _Method(function, source, module, cells_of(function))


KEPT_PLACES = 64  # a method is read anew for modules in which its names stand for something else
_PLACES: weakref.WeakKeyDictionary[types.FunctionType, dict[tuple[Any, ...], list[Place]]]
_PLACES = weakref.WeakKeyDictionary()


def _places_once(method: _Method) -> list[Place]:
    """`_places`, looked for once for all modules in which every name of the method stands for the same."""
    key = _what_names_stand_for(method)
    if key is None:
        return _places(method)
    known = _PLACES.setdefault(method.function, {})
    if key not in known:
        if len(known) >= KEPT_PLACES:
            known.clear()
        known[key] = _places(method)
    return known[key]


def _settings(place: Place, method: _Method) -> Settings | None:
    try:
        return Settings(_readings(place, method))
    except UnseenError:
        return None


def _readings(place: Place, method: _Method) -> Iterator[Reading]:
    """What an expression reads besides its value."""
    inside = set(ast.walk(place.hole))
    seen: set[int] = set()
    for node in ast.walk(place.node):
        if not isinstance(node, (ast.Name, ast.Attribute)) or node in inside:
            continue
        value = _meaning(node, method)
        if value is _UNKNOWN or value is method.module:
            continue
        if isinstance(value, types.ModuleType):
            continue  # what is read of it stands in a node of its own
        if isinstance(node, ast.Attribute):
            owner = _meaning(node.value, method)
            yield from readings_of_value(None if owner is method.module else owner, node.attr, value, seen)
        elif node.id in method.cells:
            yield from readings_of_value(method.cells[node.id], node.id, value, seen)
        else:
            yield from readings_of_value(method.function.__globals__, node.id, value, seen)


def _what_names_stand_for(method: _Method) -> tuple[Any, ...] | None:
    """Equal for two modules only if the method's expressions compute the same in both; None if that can not be told."""
    key: list[Any] = []
    for node in method.source.references:
        meaning = _meaning(node, method)
        if isinstance(meaning, _CONSTANTS):
            key.append((type(meaning), repr(meaning)))
        elif isinstance(meaning, types.ModuleType) or (_is_function(meaning) and _home(meaning) in _LIBRARIES):
            key.append(weakref.ref(meaning))  # equal to another while both are alive and the same
        elif _is_function(meaning) and _may_be_pointwise(meaning, method):
            return None  # the author's own may read what changes
        else:
            key.append(None)  # nothing that a curve is built of
    return tuple(key)


def _places(method: _Method) -> list[Place]:
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


def _place(node: ast.Call | ast.BinOp | ast.UnaryOp, method: _Method) -> Place | None:
    """The expression as a function of the one value it is computed of, if that is a known curve."""
    deep, direct = _holes(node, method), _operands(node, method) or []
    shallow = [part for part in direct if _holes(part, method)]  # for x.exp().relu(), where deep is x
    for holes in (deep, shallow):
        if not holes or holes[0] is node or len({ast.dump(hole) for hole in holes}) > 1:
            continue
        if len(holes) > 1 and not isinstance(holes[0], ast.Name):  # a value that is computed twice is two values
            continue
        if any(isinstance(part, ast.Call) and part not in ast.walk(holes[0]) for part in ast.walk(node)):
            curve = recognise(_Function(_evaluable(node, holes[0], method)))
            if curve is not None:
                return Place(node, holes[0], curve)
    return None


def _evaluable(node: ast.expr, hole: ast.expr, method: _Method) -> Callable[[Tensor], Tensor]:
    tree = ast.fix_missing_locations(ast.Expression(as_lambda(node, hole)))
    code = compile(tree, method.source.filename, "eval", method.source.flags, dont_inherit=True)
    names = {**method.function.__globals__, **_contents(method), method.source.self_name: method.module}
    function: Callable[[Tensor], Tensor] = eval(code, names)
    return function


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _holes(node: ast.expr, method: _Method) -> list[ast.expr]:
    """The parts of an expression that are not elementwise operations on others, nor constants; itself if it is none."""
    parts = _operands(node, method)
    if parts is None:
        return [node]
    return [hole for part in parts for hole in _holes(part, method)]


def _operands(node: ast.expr, method: _Method) -> list[ast.expr] | None:
    """What an elementwise operation works on, nothing for a constant, None for anything else."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, (ast.Constant, ast.Name, ast.Attribute)):
        return [] if isinstance(_meaning(node, method), _CONSTANTS) else None
    if not isinstance(node, ast.Call) or any(keyword.arg is None for keyword in node.keywords):
        return None
    arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
    function = _meaning(node.func, method)
    if function is _UNKNOWN and isinstance(node.func, ast.Attribute) and node.func.attr in _POINTWISE:
        return [node.func.value, *arguments]  # x.sigmoid()
    return arguments if _may_be_pointwise(function, method) else None


def _may_be_pointwise(function: Any, method: _Method) -> bool:
    """Functions of torch by their names, and the author's own, which recognition will try."""
    if isinstance(function, functools.partial):
        return _may_be_pointwise(function.func, method)
    if not _is_function(function):
        return False
    if _home(function) == "torch":
        return getattr(function, "__name__", "") in _POINTWISE
    own = isinstance(function, types.FunctionType) and function.__module__ == method.function.__module__
    return own or _home(function) == "math"


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, (nn.Module, type, types.MethodType))


def _home(function: Any) -> str:
    """The package that a function is from; torch's own builtins do not say."""
    return (getattr(function, "__module__", None) or "torch").partition(".")[0]


_LIBRARIES = ("torch", "math")
_UNKNOWN = object()


def _contents(method: _Method) -> dict[str, Any]:
    """What the closure of a method holds."""
    return {name: cell.cell_contents for name, cell in method.cells.items() if cell != types.CellType()}


def _meaning(node: ast.expr, method: _Method) -> Any:
    """What a constant, a name or a chain of attributes stands for, if that is fixed before the method runs."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        if node.id == method.source.self_name:
            return method.module
        if node.id in method.source.variables:
            return _UNKNOWN
        contents = _contents(method) if method.cells else {}
        return contents.get(node.id, method.function.__globals__.get(node.id, _UNKNOWN))
    if isinstance(node, ast.Attribute):
        owner = _meaning(node.value, method)
        # Of self only what stands in the instance: properties and methods may do anything.
        if owner is method.module:
            return _of_instance(method.module, node.attr)
        if isinstance(owner, types.ModuleType):
            return getattr(owner, node.attr, _UNKNOWN)
    return _UNKNOWN


def _of_instance(module: nn.Module, name: str) -> Any:
    """What `self.name` gives, where that is what the instance holds and no code of the author's decides."""
    kind = type(module)
    decided = attribute_access_is_its_own(kind) or hasattr(static_attribute(kind, name), "__set__")
    return _UNKNOWN if decided or name == "training" else module.__dict__.get(name, _UNKNOWN)
