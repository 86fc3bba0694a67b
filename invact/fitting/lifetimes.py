"""When each storage of a step is made and when it is freed, by whom, and what it holds."""

from __future__ import annotations

import bisect
import functools
import itertools
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from invact.errors.own_errors import users_call
from invact.ledger.entries import Key
from invact.ledger.ledger import module_hooks
from invact.ledger.storages import dense_parts
from invact.pytorch.backward import current_node, node_name
from invact.pytorch.containers import tree_leaves
from invact.pytorch.modes import TorchDispatchMode
from invact.pytorch.operators import cast_operation, changed_arguments, device_query
from invact.pytorch.saved_tensor_hooks import nodes_made
from invact.pytorch.tensors import storage_identity

NEVER = sys.maxsize
WEIGHT = "weight"
WEIGHT_CAST = "cast of a weight"


@dataclass(frozen=True)
class Call:
    """The first forward of a module.

    Attributes:
        began, ended: the numbers of the first operation in it and of the first one after it.
        given, gives: which of the allocations hold its arguments and its output.
    """

    began: int
    ended: int
    given: frozenset[int]
    gives: frozenset[int]


@dataclass(frozen=True)
class Allocation:
    """One storage in the course of a step.

    Attributes:
        nbytes: of the storage.
        born, died: the numbers of the operation that made it and of the first one after it was freed.
        path: the dotted path of the innermost module for which it was made; in backward, of the module whose
            forward made the graph's node.
        operator: what made it, in backward the name of the graph's node.
    """

    nbytes: int
    born: int
    died: int
    path: str
    operator: str


def levels(lives: Iterable[tuple[int, int, int]], ended: int) -> list[int]:
    """Bytes alive at each moment up to `ended`, that one included.

    Args:
        lives: bytes, the moment from which on they are alive, and the first one at which they are no more.

    Example:
        >>> levels([(8, 0, 2), (4, 1, NEVER)], ended=3)
        [8, 12, 4, 4]
    """
    changes = [0] * (ended + 2)
    for nbytes, born, died in lives:
        changes[min(born, ended)] += nbytes
        changes[min(died, ended + 1)] -= nbytes
    return list(itertools.accumulate(changes[:-1]))


class Lifetimes(TorchDispatchMode):
    """Follows every storage that operations make inside it, from being made to being freed.

    What one operation allocates for itself and frees before it ends is not seen.

    Args:
        device: whose storages are followed, if not those of all devices.

    Example:
        >>> with Lifetimes() as lifetimes:
        ...     x = torch.ones(4).exp()
        >>> [(a.nbytes, a.operator, a.died) for a in lifetimes.allocations()]
        [(16, 'ones', 2), (16, 'exp', 9223372036854775807)]
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self._device = device
        self.now = 0
        self._made: list[tuple[int, int, str, str]] = []
        self._there_before: set[int] = set()
        self._died: dict[int, int] = {}
        self._alive: dict[Key, tuple[int, Any]] = {}
        self._running: list[str] = []
        # How many nodes the graph had when the module at the same place of `_paths` began to run, or ran on.
        self._nodes: list[int] = []
        self._paths: list[str] = []
        self._in_backward = False
        self._changes: dict[Any, list[int]] = {}  # by operator, which of its arguments it changes in place
        # By allocation, the last operation of forward that changed it in place.
        self.changed: dict[int, int] = {}

    def allocations(self) -> list[Allocation]:
        """All that were made so far, in this order."""
        return [
            Allocation(nbytes, born, self._died.get(number, NEVER), path, operator)
            for number, (nbytes, born, path, operator) in enumerate(self._made)
        ]

    def see(self, tensor: Tensor, what: str) -> None:
        """Follows a tensor that was there before, under a name of its own in the place of an operator's."""
        first = len(self._made)
        self._see(tensor, what)
        self._there_before.update(range(first, len(self._made)))

    def numbers(self, tensor: Tensor) -> Iterator[int]:
        """Which of `allocations` hold what a tensor holds."""
        for part in dense_parts(tensor):
            known = self._alive.get(storage_identity(part))
            if known is not None:
                yield known[0]

    def alive(self) -> set[int]:
        """Which of `allocations` were not freed so far."""
        return {number for number, _ in self._alive.values()}

    def alive_bytes(self) -> int:
        """Of what operations made and was not freed so far.

        What was there before counts where an operation gave a view of it, unless it was told of by `see`.

        Example:
            >>> weight = torch.ones(8)
            >>> with Lifetimes() as lifetimes:
            ...     lifetimes.see(weight, WEIGHT)
            ...     row, kept, dropped = weight[:2], torch.ones(4), torch.ones(100)
            >>> del dropped
            >>> lifetimes.alive_bytes()
            16
        """
        return sum(self._made[number][0] for number in self.alive() - self._there_before)

    @contextmanager
    def by_module(self, model: nn.Module) -> Iterator[dict[str, Call]]:
        """In the block it is told who allocates; gives the first call of each module, by path."""
        calls: dict[str, Call] = {}
        began: dict[str, tuple[int, frozenset[int]]] = {}

        def before(path: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
            if path not in calls and path not in began:
                began[path] = self.now, self._held((args, kwargs))
            self._running.append(path)
            self._note_nodes()

        def after(path: str, _module: nn.Module, _args: Any, output: Any) -> None:
            if self._running:  # not where a region that is run once more stops as soon as all is there
                self._running.pop()
            if path in began:
                at, given = began.pop(path)
                calls[path] = Call(at, self.now, given, self._held(output))
            self._note_nodes()

        with module_hooks(model, before, after):
            yield calls

    @contextmanager
    def backward(self) -> Iterator[None]:
        """In the block it is told whose part of backward allocates."""
        self._running.clear()
        self._in_backward = True
        try:
            yield
        finally:
            self._in_backward = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is device_query:  # two in three of what is asked
            return args[0].device
        out = users_call(func, *args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._see(out, WEIGHT_CAST if func is cast_operation and self._is_weight(args[0]) else func)
        elif isinstance(out, (tuple, list)):
            for part in out:
                if isinstance(part, Tensor):
                    self._see(part, func)
        places = self._changes.get(func)
        if places is None:
            places = self._changes[func] = changed_arguments(func)
        for place in () if self._in_backward else places:
            if place < len(args) and isinstance(args[place], Tensor):
                self.changed.update(dict.fromkeys(self.numbers(args[place]), self.now))
        self.now += 1
        return out

    def _see(self, tensor: Tensor, made_by: Any) -> None:
        for part in dense_parts(tensor):
            key = storage_identity(part)
            if key in self._alive or not self._is_followed(part):
                continue
            number, storage = len(self._made), part.untyped_storage()
            # The storage's own end calls this, whoever holds it: PyTorch keeps its Python object as long as it lives.
            self._alive[key] = number, weakref.ref(storage, functools.partial(self._gone, key))
            path, node = self._place()
            operator = made_by if isinstance(made_by, str) else node or made_by.overloadpacket.__name__
            self._made.append((storage.nbytes(), self.now, path, operator))

    def _held(self, values: Any) -> frozenset[int]:
        tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        return frozenset(number for tensor in tensors for number in self.numbers(tensor))

    def _is_weight(self, tensor: Tensor) -> bool:
        return any(self._made[number][3] == WEIGHT for number in self.numbers(tensor))

    def _is_followed(self, part: Tensor) -> bool:
        return self._device is None or part.device.type == self._device.type

    def _gone(self, key: Key, _: Any) -> None:
        number, _ = self._alive.pop(key)
        self._died[number] = self.now

    def _place(self) -> tuple[str, str]:
        """For which module something is made now and, in backward, by which node of the graph."""
        if not self._in_backward or (node := current_node()) is None:
            return (self._running[-1] if self._running else ""), ""
        if self._running:  # a region that is run once more
            return self._running[-1], ""
        place = bisect.bisect_right(self._nodes, node._sequence_nr()) - 1
        return (self._paths[place] if place >= 0 else ""), node_name(node)

    def _note_nodes(self) -> None:
        """From this node of the graph on, nodes are of the module that runs now."""
        if not self._in_backward:
            self._nodes.append(nodes_made())
            self._paths.append(self._running[-1] if self._running else "")
