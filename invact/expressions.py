"""Activations that are written out in a module's methods, such as `F.gelu(x)` or `x * torch.sigmoid(x)`.

They are found in the source, recognised by what they compute, and run through a callable of ours by giving the one
module a method compiled anew from its own source. No other module, operation or function is touched.
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
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from invact.kernels import Curve
from invact.recognition import recognise

Runner = Callable[[nn.Module, Callable[[Tensor], Tensor], Tensor], Tensor]
"""Called in an expression's place as `runner(module, original, x)`, where `original(x)` is the expression."""

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
    """

    method: str
    number: int
    curve: Curve
    text: str
    computes: nn.Module = field(repr=False, compare=False)
    _place: _Place = field(repr=False, compare=False)


def written_in(module: nn.Module) -> list[Written]:
    """The activations that the methods of `module` compute in expressions.

    Example:
        >>> written_in(nn.TransformerEncoderLayer(8, 2, activation="gelu"))
        [Written(method='_ff_block', number=0, curve=gelu, text='self.activation(…)')]
    """
    found = []
    for name, function in _methods(type(module)):
        source = _source_of(function)
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


def install(module: nn.Module, runners: Mapping[Written, Runner]) -> None:
    """Makes `module` call each runner in place of its expression; `uninstall` undoes it."""
    by_method: dict[str, dict[Written, Runner]] = {}
    for written, runner in runners.items():
        by_method.setdefault(written.method, {})[written] = runner
    methods = dict(_methods(type(module)))
    functions = {name: _calling(methods[name], chosen) for name, chosen in by_method.items()}
    for name, function in functions.items():
        module.__dict__[name] = types.MethodType(function, module)


def uninstall(module: nn.Module) -> int:
    """Gives `module` its class's methods back; how many expressions that restores."""
    count = len(runners_in(module))
    methods = dict(_methods(type(module)))
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
class _Source:
    """A method's syntax tree, and where its names lead."""

    definition: ast.FunctionDef
    filename: str
    flags: int
    self_name: str
    variables: frozenset[str]
    cells: Mapping[str, Any]
    names: dict[str, Any]  # the globals of the file
    references: tuple[ast.expr, ...]  # the names and chains of attributes in it, each once


def _methods(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    seen = set()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            break
        for name, value in base.__dict__.items():
            if isinstance(value, types.FunctionType) and name not in seen and not name.startswith("__"):
                seen.add(name)
                yield name, value


@functools.cache
def _source_of(function: types.FunctionType) -> _Source | None:
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
    return _Source(
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


# --- finding the expressions --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """An expression that computes `curve` of the value that `hole` gives."""

    node: ast.expr
    hole: ast.expr
    curve: Curve

    @property
    def text(self) -> str:
        hole = self.hole if isinstance(self.hole, ast.Name) else ast.Name("…")
        return ast.unparse(_with_hole(self.node, self.hole, hole))


_FOUND: dict[tuple[types.FunctionType, tuple[Any, ...] | None], list[_Place]] = {}


def _places_that_can_be_rewritten(function: types.FunctionType, source: _Source, module: nn.Module) -> list[_Place]:
    """`_places`, looked for once for all modules in which every name of the method stands for the same."""
    key = _what_names_stand_for(source, module)
    places = _FOUND.get((function, key))
    if places is None:
        places = _places(source, module)
        places = places if places and _can_be_rewritten(function, places) else []
        if key is not None:
            _FOUND[function, key] = places
    return places


def _what_names_stand_for(source: _Source, module: nn.Module) -> tuple[Any, ...] | None:
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


def _places(source: _Source, module: nn.Module) -> list[_Place]:
    """The outermost recognised expressions of a method, in the order of the source, those in their values included."""
    places: list[_Place] = []

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


def _place(node: ast.Call | ast.BinOp | ast.UnaryOp, source: _Source, module: nn.Module) -> _Place | None:
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
                return _Place(node, holes[0], curve)
    return None


def _evaluable(node: ast.expr, hole: ast.expr, source: _Source, module: nn.Module) -> Callable[[Tensor], Tensor]:
    tree = ast.fix_missing_locations(ast.Expression(_lambda(node, hole)))
    code = compile(tree, source.filename, "eval", source.flags, dont_inherit=True)
    function: Callable[[Tensor], Tensor] = eval(code, {**source.names, **source.cells, source.self_name: module})
    return function


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _holes(node: ast.expr, source: _Source, module: nn.Module) -> list[ast.expr]:
    """The parts of an expression that are not elementwise operations on others, nor constants; itself if it is none."""
    parts = _operands(node, source, module)
    if parts is None:
        return [node]
    return [hole for part in parts for hole in _holes(part, source, module)]


def _operands(node: ast.expr, source: _Source, module: nn.Module) -> list[ast.expr] | None:
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


def _may_be_pointwise(function: Any, source: _Source) -> bool:
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


def _meaning(node: ast.expr, source: _Source, module: nn.Module) -> Any:
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


# --- writing the method anew --------------------------------------------------------------------------


def _can_be_rewritten(function: types.FunctionType, places: list[_Place]) -> bool:
    try:
        _factory(function, tuple(places))
    except Exception:  # a decorator or a default that does not stand a second time
        return False
    return True


def _calling(function: types.FunctionType, runners: Mapping[Written, Runner]) -> types.FunctionType:
    """The method with each expression replaced by `runner(self, lambda x: expression, value)`."""
    make = _factory(function, tuple(written._place for written in runners))
    numbered = dict(enumerate(runners.values()))
    made = make(numbered)
    setattr(made, _RUNNERS, numbered)
    return made


@functools.cache
def _factory(
    function: types.FunctionType, places: tuple[_Place, ...]
) -> Callable[[dict[int, Runner]], types.FunctionType]:
    """Makes the method anew for given runners; compiled once for all modules of a class."""
    source = _source_of(function)
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
    def __init__(self, self_name: str, places: tuple[_Place, ...]) -> None:
        self._self_name = self_name
        self._places = {_position(place.node): (number, place) for number, place in enumerate(places)}

    def visit(self, node: ast.AST) -> ast.AST:
        number, place = self._places.get(_position(node), (None, None))
        if number is None or place is None:
            return self.generic_visit(node)
        runner = ast.Subscript(ast.Name(_RUNNERS, ast.Load()), ast.Constant(number), ast.Load())
        value = self.visit(copy.deepcopy(place.hole))
        assert isinstance(value, ast.expr)
        arguments = [ast.Name(self._self_name, ast.Load()), _lambda(place.node, place.hole), value]
        return ast.copy_location(ast.Call(runner, arguments, []), node)


def _position(node: ast.AST) -> tuple[Any, ...]:
    place = (getattr(node, name, None) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset"))
    return (type(node), *place)


def _lambda(node: ast.expr, hole: ast.expr) -> ast.Lambda:
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
