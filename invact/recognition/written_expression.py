"""An expression in a method that computes a curve, and where it stands in the method's syntax tree."""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass, field

from torch import nn

from invact.kernels import Curve
from invact.recognition.dependencies import Dependencies

_HOLE = "__invact_x__"


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
        dependencies: what it reads besides its value; None if that can change unseen.
    """

    method: str
    number: int
    curve: Curve
    text: str
    computes: nn.Module = field(repr=False, compare=False)
    place: Place = field(repr=False, compare=False)
    dependencies: Dependencies | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Place:
    """An expression that computes `curve` of the value that `hole` gives."""

    node: ast.expr
    hole: ast.expr
    curve: Curve

    @property
    def text(self) -> str:
        """The expression as written, with "…" for the value if that is an expression itself."""
        hole = self.hole if isinstance(self.hole, ast.Name) else ast.Name("…")
        return ast.unparse(_with_hole(self.node, self.hole, hole))


def as_lambda(node: ast.expr, hole: ast.expr) -> ast.Lambda:
    """The expression as a function of the value that `hole` gives."""
    arguments = ast.arguments([], [ast.arg(_HOLE)], None, [], [], None, [])
    return ast.Lambda(arguments, _with_hole(node, hole, ast.Name(_HOLE, ast.Load())))


def _with_hole(expression: ast.expr, hole: ast.expr, replacement: ast.expr) -> ast.expr:
    """A copy of an expression with `replacement` wherever `hole` stands."""
    wanted = ast.dump(hole)

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return replacement if ast.dump(node) == wanted else self.generic_visit(node)

    replaced = Replace().visit(copy.deepcopy(expression))
    assert isinstance(replaced, ast.expr)
    return replaced
