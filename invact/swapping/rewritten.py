"""The class of a module with expressions in its methods that are inverted, approximated or watched."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from invact.recognition.rewriting import Runner, calling
from invact.recognition.sources import methods_of
from invact.recognition.written_expression import Written
from invact.swapping.approximation import Approximation
from invact.swapping.class_over import class_over, shared_class
from invact.swapping.inversion import Inversion
from invact.swapping.patched import Patched, PatchedSite, is_patched


@dataclass(frozen=True)
class ExpressionRunner:
    """Inverts or approximates in an expression's place; see `invact.recognition.rewriting`."""

    how: Inversion | Approximation

    def __call__(self, module: nn.Module, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.how(x) if self.how.applies(module, x) else original(x)


def in_an_expression(how: Inversion | Approximation) -> ExpressionRunner:
    """What runs in an expression's place. One that is inverted is never derived instead: there inverting keeps less."""
    return ExpressionRunner(replace(how, derivable=False) if isinstance(how, Inversion) else how)


def rewritten_class(stock: type[nn.Module], runners: Mapping[Written, Runner]) -> type:
    """Of a module of the class `stock` in whose methods these run in the place of expressions."""
    done = tuple((written.method, written.number, runner) for written, runner in runners.items())
    return shared_class(stock, done, lambda: _with_rewritten_methods(stock, runners))


def _with_rewritten_methods(stock: type[nn.Module], runners: Mapping[Written, Runner]) -> type:
    by_method: dict[str, dict[Written, Runner]] = {}
    for written, runner in runners.items():
        by_method.setdefault(written.method, {})[written] = runner
    functions = dict(methods_of(stock))
    methods = {name: _rewritten_method(stock, name, functions[name], chosen) for name, chosen in by_method.items()}
    sites = tuple(PatchedSite(w.method, str(w.curve), _bits_of(runner)) for w, runner in runners.items())
    return class_over(stock, Patched, methods, sites)


def _bits_of(runner: Runner) -> int | None:
    return runner.how.bits if isinstance(runner, ExpressionRunner) else None


def _rewritten_method(
    stock: type[nn.Module], name: str, function: types.FunctionType, runners: Mapping[Written, Runner]
) -> Callable[..., Any]:
    """The method that stands at `name`, which need not be the function's own name."""
    rewritten, code = calling(function, runners), function.__code__
    defaults, by_keyword = function.__defaults__, function.__kwdefaults__

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Another method may have been put in its place, or its code and defaults exchanged, since it was read.
        if not torch.compiler.is_compiling():
            known = function.__code__ is code and function.__defaults__ is defaults
            known = known and function.__kwdefaults__ is by_keyword and getattr(stock, name) is function
            if not (known and is_patched(self)):
                return getattr(stock, name)(self, *args, **kwargs)
        return rewritten(self, *args, **kwargs)

    return method
