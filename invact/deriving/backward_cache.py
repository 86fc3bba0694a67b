"""What several ask for in a backward pass: made once, and let go when all of them have it."""

from __future__ import annotations

import weakref

from torch import Tensor

from invact.pytorch.backward import current_backward, when_backward_ends
from invact.pytorch.devices import current_stream


class Shared:
    """What several ask for in a backward pass: made once, and let go after the last of them, or when the pass ends.

    Attributes:
        users: how many ask for it in a pass that runs all of the graph.
    """

    __slots__ = ("__weakref__", "backward", "left", "stream", "tensor", "users")

    def __init__(self, users: int) -> None:
        self.users, self.left, self.stream, self.backward = users, 0, 0, -1
        self.tensor: Tensor | None = None

    def taken(self) -> Tensor | None:
        """What somebody has made before in this pass and on this stream, if he has."""
        tensor = self.tensor
        if tensor is None or self.backward != current_backward() or self.stream != current_stream(tensor):
            return None
        self.left -= 1
        if self.left <= 0:
            self.tensor = None
        return tensor

    def put(self, tensor: Tensor) -> None:
        """For those who ask after the one that it was made for."""
        self.tensor = None
        if self.users > 1 and (backward := current_backward()) >= 0:
            self.tensor, self.left, self.backward = tensor, self.users - 1, backward
            self.stream = current_stream(tensor)
            _let_go_after(backward, self)


# By the number of the backward pass: what is held there for whoever asks next. One that breaks off leaves it in its
# graph, where no other pass takes it, until the next one that asks.
_SHARED: dict[int, list[weakref.ref[Shared]]] = {}


def _let_go_after(backward: int, shared: Shared) -> None:
    """Some may never ask, where not all of the graph is run."""
    held = _SHARED.get(backward)
    if held is None:
        held = _SHARED[backward] = []
        when_backward_ends(lambda: _let_go(backward))
    held.append(weakref.ref(shared))


def _let_go(backward: int) -> None:
    for reference in _SHARED.pop(backward, ()):
        shared = reference()
        if shared is not None and shared.backward == backward:
            shared.tensor = None
