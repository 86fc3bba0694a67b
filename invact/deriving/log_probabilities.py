"""The log-probabilities of a loss, which are let go as soon as nobody asks for them any more."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from invact.deriving.handles import Derived, Handle
from invact.pytorch.backward import keeps_graph


class LogProbabilities(Derived):
    """Those of a loss, as large as nothing else: what they are made of goes with the last who asks for them.

    At the turn from forward to backward the logits in 16 bits would lie beside their log-probabilities, the gradient
    that comes in and the one that goes out, which stock keeps without the first.

    Attributes:
        askers: nodes and recipes that ask for it.
        done: nodes that have asked and are about to be freed.
    """

    __slots__ = ("askers", "done")

    def __init__(self, make: Callable[..., Tensor], logits: Handle) -> None:
        super().__init__(make, (logits,), joins=False, moves=True)
        self.askers = self.done = 0

    def wanted_again(self) -> None:
        self.askers += 1
        super().wanted_again()

    def given_to_a_node(self) -> None:
        """To one of PyTorch's own, which asks once each time it runs."""
        if not keeps_graph():
            self.done += 1
            if self.done == self.askers:
                self.sources = ()
