"""A count of what lives, whoever keeps it: also where tensors are kept past autograd's own hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from invact.pytorch_inside import tree_leaves


class LivingStorages(TorchDispatchMode):
    """Sees every tensor that is made inside it, whoever asks for it, and tells how much of them still lives.

    What was there before, such as a weight of which a view is taken, is told from what is new by an operator's inputs.

    Example:
        >>> import torch
        >>> with LivingStorages() as living:
        ...     kept, dropped = torch.ones(8) + 1, torch.ones(100)
        >>> del dropped
        >>> living.nbytes()
        32
    """

    def __init__(self) -> None:
        super().__init__()
        # By a number, which a weak reference keeps from going to others.
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}
        self._there_before: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for reference, _ in _storages((args, kwargs)):
            if reference.cdata not in self._found:
                self._there_before.setdefault(reference.cdata, reference)
        out = func(*args, **(kwargs or {}))
        for reference, nbytes in _storages(out):
            if reference.cdata not in self._there_before:
                self._found.setdefault(reference.cdata, (reference, nbytes))
        return out

    def nbytes(self) -> int:
        return sum(nbytes for reference, nbytes in self._found.values() if not reference.expired())


def _storages(values: Any) -> Iterator[tuple[StorageWeakRef, int]]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            yield StorageWeakRef(storage), storage.nbytes()
