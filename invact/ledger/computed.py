"""What the operators of a forward pass made, of what, and which of it only moving memory would make again.

A forward pass is a graph of values: what a storage holds between two changes. Some values can not be made again without
a matrix product, or not at all: the roots. The others can, from what their operator read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invact.errors.own_errors import users_call
from invact.ledger.entries import Key
from invact.ledger.operator_kinds import CONSTANTS, INPUTS, RANDOM, RESIDUAL_SUMS, UNWRITTEN, Rule, other_kind, rule_of
from invact.ledger.storages import dense_parts
from invact.pytorch.modes import TorchDispatchMode
from invact.pytorch.tensors import StorageWeakRef, storage_identity


@dataclass(slots=True)
class Value:
    """What one storage holds between two changes in place.

    Attributes:
        nbytes: of the whole storage; an eighth where it holds bools, since those can be kept in bits.
        operator: its plain name, such as "gelu"; "" for what was there before the pass.
        made_by: what kind of root this is, such as "matrix products"; None of what only moving memory makes again.
        reads: the values from which it is made again, by number, those that cost something; of roots, only a
            residual sum has them.
        roots: the roots it comes of, one bit each.
    """

    nbytes: int
    operator: str
    made_by: str | None
    reads: tuple[int, ...]
    roots: int
    gradient: bool = False  # whether gradients flow back through it
    unwritten: bool = False  # fresh from torch.empty


class Computed(TorchDispatchMode):
    """Records what the operators of a forward pass made, and of what; it keeps no tensor alive.

    Args:
        weights: parameters and buffers, which are there anyway: what comes of them alone costs nothing to make again.

    Example:
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()), torch.ones(4, 8)
        >>> with Computed(model.parameters()) as computed:
        ...     y = model(x)
        >>> [(value.operator, value.made_by) for value in computed.values[2:]]
        [('', 'inputs'), ('addmm', 'matrix products'), ('gelu', None)]
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.values: list[Value] = []
        self.changed_unseen = ""  # an operator that changed what autograd had recorded, and was not recorded itself
        self._in_graph: set[Key] = set()
        self._of_gradients = 0  # the roots through which gradients flow back, one bit each
        self._now: dict[Key, int] = {}  # the number of the value that each storage holds
        # While there is a weak reference, no other storage gets the identity.
        self._identities: list[StorageWeakRef] = []
        for tensor in weights:
            for part in dense_parts(tensor):
                self._put(part, Value(0, "", None, (), 0, gradient=tensor.requires_grad))
        self._first = len(self.values)  # of those that are no weights

    def number(self, key: Key) -> int | None:
        """Which of `values` a storage holds now; None if no operator has met it."""
        return self._now.get(key)

    def is_weight(self, key: Key) -> bool:
        """Whether a storage holds a parameter or a buffer as it was before the pass."""
        number = self._now.get(key)
        return number is not None and number < self._first

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = users_call(func, *args, **kwargs)
        rule = rule_of(func)
        new = [(n, part) for n, part in enumerate(_parts(out)) if storage_identity(part) not in self._now]
        written = [args[n] for n in rule.changes if n < len(args)]
        written += [kwargs.get(name) for name in rule.changes_named]
        changed = _parts(written)
        if not new and not changed:  # a view, or something that only looks
            return out
        if changed and not self.changed_unseen and self._is_unseen(written):
            self.changed_unseen = rule.operator + "_"
        # Fresh noise and zeros shaped like something are filled in place, and integers have no gradients.
        may_be_in_graph = torch.is_grad_enabled() and rule.made_by not in (CONSTANTS, RANDOM)
        if may_be_in_graph and _needs_gradient([*args, *kwargs.values()]):
            parts = [*changed, *(part for _, part in new)]
            self._in_graph.update(storage_identity(part) for part in parts if part.is_floating_point())
        self._record(rule, args, kwargs, new, changed)
        return out

    def _is_unseen(self, written: Any) -> bool:
        """Whether an operator writes into what autograd has recorded, past autograd."""
        known = any(storage_identity(part) in self._in_graph for part in _parts(written))
        return known and not (torch.is_grad_enabled() and _needs_gradient(written))

    def _record(
        self,
        rule: Rule,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        new: list[tuple[int, Tensor]],
        changed: list[Tensor],
    ) -> None:
        keys = {storage_identity(part) for part in changed}
        read = [self._read(part, rule, keys) for arg in (*args, *kwargs.values()) for part in _parts(arg)]
        reads = [number for number in dict.fromkeys(read) if number is not None]
        kind = self._kind(rule, args)
        statistics: list[int] = []
        # The last output first: a norm's first one is made again with its statistics, dropout's with its mask.
        for n, part in reversed(new):
            if storage_identity(part) in self._now:  # a view of an input, first met here
                continue
            if n and rule.later_outputs is not None:
                statistics.append(self._put_root(part, rule.operator, rule.later_outputs, reads))
            else:
                self._put_output(part, rule.operator, kind, [*reads, *statistics])
        for part in changed:
            self._put_output(part, rule.operator, kind, reads)

    def _read(self, part: Tensor, rule: Rule, changed: set[Key]) -> int | None:
        """The number of the value that an operator reads; None if it only writes there."""
        key = storage_identity(part)
        number = self._now.get(key)
        if number is None:  # there before the pass: an input, or a tensor that the model holds by itself
            return self._put_root(part, "", INPUTS, [])
        value = self.values[number]
        if key in changed and (value.unwritten or (rule.overwrites and _is_whole(part))):
            return None
        if value.unwritten:  # not by an operator of PyTorch's, but by now somebody's kernel has
            return self._put_root(part, value.operator, other_kind(value.operator), [])
        return number

    def _kind(self, rule: Rule, args: tuple[Any, ...]) -> str | None:
        """What kind of root the operator makes of these arguments, or None."""
        if rule.reduces:
            return None if rule.leaves_rows(args) else other_kind(rule.operator)
        if rule.sums:
            one, other = self._roots_of_gradients(args[:1]), self._roots_of_gradients(args[1:])
            return None if one & other in (one, other) else RESIDUAL_SUMS
        return rule.made_by

    def _roots_of_gradients(self, args: tuple[Any, ...]) -> int:
        roots = 0
        for arg in args:
            for part in _parts(arg):
                roots |= self.values[self._now[storage_identity(part)]].roots
        return roots & self._of_gradients

    def _put_output(self, part: Tensor, operator: str, kind: str | None, reads: list[int]) -> None:
        if kind is not None:
            self._put_root(part, operator, kind, reads)
            return
        roots = 0
        for number in reads:
            roots |= self.values[number].roots
        gradient = any(self.values[number].gradient for number in reads)
        self._put(part, Value(_nbytes(part), operator, None, self._costly(reads), roots, gradient))

    def _put_root(self, part: Tensor, operator: str, kind: str, reads: list[int]) -> int:
        if kind == CONSTANTS:
            return self._put(part, Value(0, operator, None, (), 0, unwritten=operator in UNWRITTEN))
        gradient = part.requires_grad or (kind != RANDOM and any(self.values[n].gradient for n in reads))
        bit = 1 << len(self.values)
        if gradient:
            self._of_gradients |= bit
        summands = self._costly(reads) if kind == RESIDUAL_SUMS else ()
        return self._put(part, Value(_nbytes(part), operator, kind, summands, bit, gradient))

    def _costly(self, reads: list[int]) -> tuple[int, ...]:
        return tuple(number for number in reads if self.values[number].roots)

    def _put(self, part: Tensor, value: Value) -> int:
        key = storage_identity(part)
        if key not in self._now:
            self._identities.append(StorageWeakRef(part.untyped_storage()))
        self._now[key] = len(self.values)
        self.values.append(value)
        return len(self.values) - 1


def _parts(arg: Any) -> list[Tensor]:
    """The tensors with a storage inside an argument or a result."""
    if isinstance(arg, Tensor):
        return list(dense_parts(arg))
    if isinstance(arg, (tuple, list)):
        return [part for item in arg for part in _parts(item)]
    return []


def _needs_gradient(arg: Any) -> bool:
    """Whether one of the tensors in an argument does; the numbers inside a subclass do not say."""
    if isinstance(arg, Tensor):
        return arg.requires_grad
    return isinstance(arg, (tuple, list)) and any(_needs_gradient(item) for item in arg)


def _nbytes(part: Tensor) -> int:
    nbytes = part.untyped_storage().nbytes()
    return -(-nbytes // 8) if part.dtype is torch.bool else nbytes


def _is_whole(part: Tensor) -> bool:
    return part.numel() * part.element_size() == part.untyped_storage().nbytes()
