"""An activation that keeps its output instead of its input for backward: where it does, and where stock code runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from invact.deriving.hooks import SMALLEST, is_deriving
from invact.inverting import autograd_functions
from invact.kernels import Curve
from invact.pytorch.circumstances import hooks_on_all_modules, transforms_active
from invact.recognition.dependencies import Dependencies
from invact.swapping.patched import Patched
from invact.swapping.planned_device import planned_device

_THREAD = threading.local()


SMALLEST_INVERTED = 16384
"""Elements from which on an activation is inverted where its output could be derived as well.

Both keep one tensor, and inverting computes nothing twice; but it takes many operators of a CPU, and a kernel's start
of a GPU's host: for fewer elements than these more time than the stock operator run again. Below `SMALLEST` nothing
is derived, and inverting is all there is, as it is of an expression that is inverted: there it keeps less.
"""


LARGEST_INVERTED_ON_CPU = 262144
"""Elements up to which it is inverted on a CPU, where its operators are passes over memory: of more it takes
milliseconds longer than the stock operator run again."""


@dataclass(frozen=True)
class Inversion:
    """How a site is inverted.

    Attributes:
        curve: what is computed there.
        dependencies: what its code reads besides its input. While it is anything else, the stock code runs.
        in_place: the output takes the memory of the input.
        derivable: where tensors are derived, the stock code would keep no more, since its output is made again: then
            it runs where that takes less time.
    """

    curve: Curve
    dependencies: Dependencies
    in_place: bool = False
    derivable: bool = True
    bits: ClassVar[None] = None  # of a derivative that is approximate; this one is not

    def applies(self, module: nn.Module, x: Any) -> bool:
        """Whether `x` is to be computed here and not by the stock code."""
        if self.derivable and _better_derived(x):
            return False
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout is not torch.strided:
            return False  # fx, for one, traces with what is no tensor
        if getattr(_THREAD, "watched", None) is not None and transforms_active():
            return False  # what hooks change can not be told there
        return autograd_functions.wants_gradient(x) and self.dependencies.unchanged(module)

    def __call__(self, x: Tensor) -> Tensor:
        watched = getattr(_THREAD, "watched", None)
        before = x.clone() if watched is not None and self.in_place else x
        y = autograd_functions.invert(x, self.curve, self.in_place)
        if watched is not None:
            watched.append((before, y, y.grad_fn, y._version))
        return y


def _better_derived(x: Any) -> bool:
    """Whether its output can be derived, and that takes less time than to invert."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return False  # before asking for a size, which a graph would be bound to
    count = x.numel()
    if SMALLEST_INVERTED <= count <= LARGEST_INVERTED_ON_CPU:
        return False  # on any device, so none is asked for
    return is_made_again(count, planned_device() or x.device) and is_deriving(True)


def is_made_again(count: int, device: torch.device) -> bool:
    """Whether to run the stock operator on so many elements, and once more in backward, takes less time than to invert.

    Example:
        >>> [is_made_again(count, torch.device("cpu")) for count in (100, 5_000, 50_000, 500_000)]
        [False, True, False, True]
    """
    if count > LARGEST_INVERTED_ON_CPU:
        return device.type == "cpu"
    return SMALLEST <= count < SMALLEST_INVERTED


class Inverted(Patched):
    """In the class of an activation that keeps its output instead of its input for backward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Hooks may change the output in place, which stock allows: then the input is kept after all."""
        hooked = self._forward_hooks or hooks_on_all_modules()  # type: ignore[attr-defined]
        if torch.compiler.is_compiling() or not hooked:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with _changed_outputs_kept_right():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def _changed_outputs_kept_right() -> Iterator[None]:
    outer = getattr(_THREAD, "watched", None)
    watched: list[tuple[Tensor, Tensor, Any, int]] = []
    _THREAD.watched = watched
    try:
        yield
    finally:
        _THREAD.watched = outer
    for x, y, node, version in watched:
        if y._version != version and hasattr(node, "input"):
            node.input = x
