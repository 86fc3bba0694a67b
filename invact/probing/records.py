"""What a probe tells of one forward pass, as plain records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from invact.ledger.entries import Entry, Key, Memory

if TYPE_CHECKING:  # who reads a record need not load what recorded it
    from invact.deriving.derived_tensor import DerivedTensor
    from invact.ledger.computed import Computed
    from invact.ledger.own_loss import OwnLoss


@dataclass(frozen=True)
class Call:
    """One call of a watched site during the forward pass; of one without plain tensors no more is told than this."""

    path: str
    simple: bool  # one floating tensor in, one of the same shape and device out
    needs_grad: bool = False
    numel: int = 0  # elements of the input
    y_key: Key = 0
    y_nbytes: int = 0  # of the output as inversion would make it: dense, in the dtype of the input
    y_cast: bool = False  # the module's own output has another dtype than its input
    dtype: torch.dtype = torch.float32  # of the input
    bit_nbytes: int = 0  # of one bit per element
    changed_later: bool = False
    input_changed_later: bool = False
    input_contiguous: bool = False
    in_place: bool = False  # the output is the input, changed
    hooked: bool = False  # a hook changes the output, or gives another
    elsewhere: bool = False  # in another thread than the probe's


@dataclass(frozen=True)
class Stock:
    """What stock PyTorch would have kept in the same pass."""

    entries: list[Entry]
    memory: Memory


@dataclass
class Observation:
    """What one forward pass kept for backward."""

    entries: list[Entry]
    memory: Memory
    calls: list[Call]
    labels: dict[str, str]  # class names, or expressions, by path
    checkpoints: int = 0
    without_hooks: int = 0  # how often the model entered torch.func or the like, where no hooks may be
    computed: Computed | None = None  # what made what, if that was asked for
    stock: Stock | None = None  # without what is derived, if that was asked for
    derived: list[DerivedTensor] = field(default_factory=list)
    loss: OwnLoss | None = None  # if the forward gave one
    why_kept: dict[Key, str] = field(default_factory=dict)  # and why what is kept is not
    read: set[Key] = field(default_factory=set)  # the storages that derived tensors are made again from
    notes: list[str] = field(default_factory=list)
