"""What a count of kept bytes comes to, as plain records: the storages that are kept, and their totals."""

from __future__ import annotations

from dataclasses import dataclass, field

Key = int
"""Identity of a storage, unique among the storages that are alive."""


@dataclass(frozen=True)
class Entry:
    """One storage that one module keeps for backward."""

    key: Key
    nbytes: int
    path: str  # dotted path of the innermost module that was running; "" is the model itself
    cast_of: Key | None  # the storage it was cast from, if autocast or the model changed its dtype


@dataclass
class Memory:
    """Bytes that autograd keeps between forward and backward; each storage is counted once.

    Attributes:
        total_bytes: activations, without the model's parameters and buffers and without `weight_cast_bytes`.
        by_module: bytes by the dotted path of the module that last kept them ("" is the model itself).
        by_class: the same by class name.
        weight_cast_bytes: low-precision copies of weights that autocast keeps; they do not grow with the batch.
    """

    total_bytes: int
    by_module: dict[str, int] = field(repr=False)
    by_class: dict[str, int]
    weight_cast_bytes: int = 0
