"""What the loss that a model computes itself keeps: whatever comes of the logits, down to the next matrix product."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from invact.ledger.computed import Computed
from invact.ledger.entries import Entry, Key
from invact.ledger.storages import storage_sizes

_SMALLEST_VOCABULARY = 1024
"""Fewer logits of a token are taken for those of its labels, in tagging say; chosen, not measured."""


@dataclass(frozen=True)
class OwnLoss:
    """What a forward that gave a loss gave beside it.

    Attributes:
        logits: the storages of what it predicted.
        tokens, vocabulary: rows and columns of the largest of these, if it has entries of a vocabulary for tokens of
            texts; else 0.
    """

    logits: frozenset[Key]
    tokens: int = 0
    vocabulary: int = 0


def own_loss(output: Any) -> OwnLoss | None:
    """What is known of the loss in a forward's output: a field of that name, or a single number; None without one.

    Example:
        >>> import torch
        >>> own_loss({"loss": torch.tensor(0.5), "logits": torch.zeros(2, 8, 2000)}).tokens
        16
        >>> own_loss(torch.zeros(2, 8)) is None
        True
    """
    if isinstance(output, Tensor):
        return OwnLoss(frozenset()) if not output.dim() and output.is_floating_point() else None
    if not isinstance(output, dict) or not isinstance(output.get("loss"), Tensor):
        return None
    logits = [value for name, value in output.items() if "logits" in name and isinstance(value, Tensor)]
    largest = max(logits, key=lambda each: each.numel(), default=None)
    keys = frozenset(key for each in logits for key in storage_sizes(each))
    if largest is None or largest.dim() != 3 or largest.shape[-1] < _SMALLEST_VOCABULARY:
        return OwnLoss(keys)
    return OwnLoss(keys, largest.shape[0] * largest.shape[1], largest.shape[2])


def loss_bytes(loss: OwnLoss | None, computed: Computed, kept: Iterable[Entry]) -> int:
    """Bytes kept of the logits and of what is made of them, by the matrix product that gave them; 0 without a loss."""
    numbers = [computed.number(key) for key in loss.logits] if loss is not None else []
    roots = 0
    for number in numbers:
        roots |= 0 if number is None else computed.values[number].roots
    found: dict[Key, int] = {}
    for entry in kept:
        number = computed.number(entry.key)
        if number is not None and computed.values[number].roots & roots:
            found[entry.key] = entry.nbytes
    return sum(found.values())
