"""Takes training steps with a copy of a model: how long they take, what they keep, which gradients they give."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from invact.bench import stepper
from invact.bench.timing import Race
from invact.bench.ways import Way, stock
from invact.fitting.lifetimes import WEIGHT, Lifetimes
from invact.pytorch.containers import tree_leaves


class Stepper(stepper.Stepper):
    """One that says as well which gradients its steps give, and what lives in them.

    Args:
        around: made anew and entered for every forward.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        way: Way = stock,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        super().__init__(model, inputs, way)
        self.around = around
        self._directions: list[Tensor] = []

    def gradients(self) -> list[Tensor | None]:
        """Those of one step, which are then no longer the model's."""
        self.prepare()
        self.loss().backward()
        found = [parameter.grad for parameter in self.model.parameters()]
        self.model.zero_grad()
        return found

    def live_bytes(self) -> int:
        """What lives at the end of forward that did not before; on a GPU as its allocator counts."""
        gc.collect()
        self.prepare()
        if self.device.type == "cuda":
            loss = self.loss()
            return torch.cuda.memory_allocated(self.device) - self.allocated
        lifetimes = Lifetimes()
        for tensor in (*self.model.parameters(), *self.model.buffers(), *tree_leaves((self.inputs, self._directions))):
            if isinstance(tensor, Tensor):
                lifetimes.see(tensor, WEIGHT)
        with lifetimes:
            loss = self.loss()
        gc.collect()
        found = lifetimes.alive_bytes()
        del loss
        return found

    def loss(self) -> Tensor:
        """The model's own; else what it gives along random directions, since of what a norm gave last, or of what has
        the length 1, the mean square says nothing."""
        with self.around():
            output = stepper.called(self.forward, self.inputs)
            own: Tensor | None = getattr(output, "loss", None)
        if own is not None:
            return own
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if not self._directions:
            generator = torch.Generator().manual_seed(0)
            self._directions = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
        pairs = zip(outputs, self._directions, strict=True)
        return torch.stack([(t * direction).mean(dtype=torch.float32) for t, direction in pairs]).sum()


# --- figures ------------------------------------------------------------------------------------------


def times(race: Race, name: str) -> dict[str, Any]:
    return {
        "seconds": race.median(name),
        "ratio": race.ratio(name),
        "quartiles": race.quartiles(name),
        "rounds": race.rounds,
    }


def bits_equal(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return all(torch.equal(a, b) for a, b in _pairs(found, expected))


def difference(found: list[Tensor | None], expected: list[Tensor | None]) -> dict[str, float]:
    """Relative difference of all gradients as one vector, and the largest of one parameter's."""
    pairs = [(a.float(), b.float()) for a, b in _pairs(found, expected)]
    off = torch.stack([(a - b).norm() for a, b in pairs]).cpu()
    size = torch.stack([b.norm() for _, b in pairs]).cpu()
    # A parameter whose gradient is nothing but rounding, as a key's bias, has no relative error to speak of.
    tells = size > 1e-3 * size.max()
    return {
        "whole": float(off.norm() / size.norm()),
        "largest": float((off / size)[tells].max()),
    }


def _pairs(found: list[Tensor | None], expected: list[Tensor | None]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of the parameters that have a gradient; both must have it."""
    for one, other in zip(found, expected, strict=True):
        if (one is None) != (other is None):
            raise ValueError("a parameter has a gradient in one of the two ways and none in the other")
        if one is not None and other is not None:
            yield one, other
