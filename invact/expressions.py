"""Activations that are written out in a module's methods, such as `F.gelu(x)` or `x * torch.sigmoid(x)`.

They are found in the source and recognised by what they compute; `rewriting` runs them through a callable of ours.
"""

from __future__ import annotations

import ast
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from invact.recognition import recognise
from invact.rewriting import Place, Source, Written, as_lambda, can_be_rewritten, methods_of, source_of

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
        source = source_of(function)
        if source is None or not _runs(module, name, function):
            continue
        places = _places_that_can_be_rewritten(function, source, module)
        for number, place in enumerate(places):
            # Made for this module, and not kept with the place: what is read once outlives the module.
            computes = _Function(_evaluable(place.node, place.hole, source, module))
            found.append(Written(name, number, place.curve, place.text, computes, place))
    return found


def _runs(module: nn.Module, name: str, function: types.FunctionType) -> bool:
    """Whether `module` calls its class's method by that name, and not one that was given to it alone."""
    own = module.__dict__.get(name)
    # A pickle of a patched module comes back with its class's method, bound, as an attribute.
    return own is None or (isinstance(own, types.MethodType) and own.__func__ is function)


_FOUND: dict[tuple[types.FunctionType, tuple[Any, ...] | None], list[Place]] = {}


def _places_that_can_be_rewritten(function: types.FunctionType, source: Source, module: nn.Module) -> list[Place]:
    """`_places`, looked for once for all modules in which every name of the method stands for the same."""
    key = _what_names_stand_for(source, module)
    places = _FOUND.get((function, key))
    if places is None:
        places = _places(source, module)
        places = places if places and can_be_rewritten(function, places) else []
        if key is not None:
            _FOUND[function, key] = places
    return places


def _what_names_stand_for(source: Source, module: nn.Module) -> tuple[Any, ...] | None:
    """Equal for two modules only if the method's expressions compute the same in both; None if that can not be told."""
    key: list[Any] = []
    for node in source.references:
        meaning = _meaning(node, source, module)
        if isinstance(meaning, _CONSTANTS):
            key.append((type(meaning), repr(meaning)))
        elif isinstance(meaning, types.ModuleType) or (_is_function(meaning) and _home(meaning) in _LIBRARIES):
            key.append(weakref.ref(meaning))  # equal to another while both are alive and the same
        elif _is_function(meaning):
            return None  # the author's own may read what changes
        else:
            key.append(None)  # nothing that a curve is built of
    return tuple(key)


def _places(source: Source, module: nn.Module) -> list[Place]:
    """The outermost recognised expressions of a method, in the order of the source, those in their values included."""
    places: list[Place] = []

    def walk(node: ast.AST) -> None:
        place = _place(node, source, module) if isinstance(node, (ast.Call, ast.BinOp, ast.UnaryOp)) else None
        if place is not None:
            places.append(place)
            walk(place.hole)
        else:
            for child in ast.iter_child_nodes(node):
                walk(child)

    for statement in source.definition.body:
        walk(statement)
    return places


def _place(node: ast.Call | ast.BinOp | ast.UnaryOp, source: Source, module: nn.Module) -> Place | None:
    """The expression as a function of the one value it is computed of, if that is a known curve."""
    deep, direct = _holes(node, source, module), _operands(node, source, module) or []
    shallow = [part for part in direct if _holes(part, source, module)]  # for x.exp().relu(), where deep is x
    for holes in (deep, shallow):
        if not holes or holes[0] is node or len({ast.dump(hole) for hole in holes}) > 1:
            continue
        if len(holes) > 1 and not isinstance(holes[0], ast.Name):  # a value that is computed twice is two values
            continue
        if any(isinstance(part, ast.Call) and part not in ast.walk(holes[0]) for part in ast.walk(node)):
            curve = recognise(_Function(_evaluable(node, holes[0], source, module)))
            if curve is not None:
                return Place(node, holes[0], curve)
    return None


def _evaluable(node: ast.expr, hole: ast.expr, source: Source, module: nn.Module) -> Callable[[Tensor], Tensor]:
    tree = ast.fix_missing_locations(ast.Expression(as_lambda(node, hole)))
    code = compile(tree, source.filename, "eval", source.flags, dont_inherit=True)
    function: Callable[[Tensor], Tensor] = eval(code, {**source.names, **source.cells, source.self_name: module})
    return function


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _holes(node: ast.expr, source: Source, module: nn.Module) -> list[ast.expr]:
    """The parts of an expression that are not elementwise operations on others, nor constants; itself if it is none."""
    parts = _operands(node, source, module)
    if parts is None:
        return [node]
    return [hole for part in parts for hole in _holes(part, source, module)]


def _operands(node: ast.expr, source: Source, module: nn.Module) -> list[ast.expr] | None:
    """What an elementwise operation works on, nothing for a constant, None for anything else."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, (ast.Constant, ast.Name, ast.Attribute)):
        return [] if isinstance(_meaning(node, source, module), _CONSTANTS) else None
    if not isinstance(node, ast.Call) or any(keyword.arg is None for keyword in node.keywords):
        return None
    arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
    function = _meaning(node.func, source, module)
    if function is _UNKNOWN and isinstance(node.func, ast.Attribute) and node.func.attr in _POINTWISE:
        return [node.func.value, *arguments]  # x.sigmoid()
    return arguments if _may_be_pointwise(function, source) else None


def _may_be_pointwise(function: Any, source: Source) -> bool:
    """Functions of torch by their names, and the author's own, which recognition will try."""
    if isinstance(function, functools.partial):
        return _may_be_pointwise(function.func, source)
    if not _is_function(function):
        return False
    if _home(function) == "torch":
        return getattr(function, "__name__", "") in _POINTWISE
    own = isinstance(function, types.FunctionType) and function.__module__ == source.names.get("__name__")
    return own or _home(function) == "math"


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, (nn.Module, type, types.MethodType))


def _home(function: Any) -> str:
    """The package that a function is from; torch's own builtins do not say."""
    return (getattr(function, "__module__", None) or "torch").partition(".")[0]


_LIBRARIES = ("torch", "math")
_UNKNOWN = object()


def _meaning(node: ast.expr, source: Source, module: nn.Module) -> Any:
    """What a constant, a name or a chain of attributes stands for, if that is fixed before the method runs."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        if node.id == source.self_name:
            return module
        if node.id in source.variables:
            return _UNKNOWN
        return source.cells.get(node.id, source.names.get(node.id, _UNKNOWN))
    if isinstance(node, ast.Attribute):
        owner = _meaning(node.value, source, module)
        # Of self only what stands in the instance: properties and methods may do anything.
        if owner is module:
            return _UNKNOWN if node.attr == "training" else module.__dict__.get(node.attr, _UNKNOWN)
        if isinstance(owner, types.ModuleType):
            return getattr(owner, node.attr, _UNKNOWN)
    return _UNKNOWN
