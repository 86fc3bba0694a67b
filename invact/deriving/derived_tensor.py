"""What a report tells of a tensor that is made again in backward."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DerivedTensor:
    """One tensor that is made again in backward instead of being kept.

    Attributes:
        what: the tensor in words: "LayerNorm's output", by the class of the module whose output it is, or "a product in
            LlamaMLP".
        kept_by: dotted path of the module that would have kept it, the first of them.
        path: of the module whose output it is, or in which it is made; `kept_by` where that can not be told.
        reason: what it is made again from, or how it is kept in less.
        bytes_saved: that are no longer kept.
        bytes_moved: read and written in backward to make it again. What is made on the way to several tensors, once,
            counts to the first of them.
        keepers: how many modules would have kept it.
    """

    what: str
    kept_by: str
    path: str
    reason: str
    bytes_saved: int
    bytes_moved: int
    keepers: int = 1
