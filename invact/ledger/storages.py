"""The storages behind a tensor, down to the plain tensors that a subclass wraps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from invact.ledger.entries import Key
from invact.pytorch.tensors import StorageWeakRef, is_traceable_wrapper_subclass, sparse_parts


def dense_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors inside `tensor`: itself, or what a subclass such as DTensor wraps."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            inner = getattr(tensor, name)
            if isinstance(inner, Tensor):  # of a DTensor's parts one is its mesh
                yield from dense_parts(inner)
    elif tensor.layout is torch.strided:
        yield tensor
    elif tensor.layout is torch.sparse_coo:
        yield from sparse_parts(tensor)


def storage_sizes(tensor: Tensor) -> dict[Key, int]:
    """Bytes of each storage behind `tensor`: the whole storage, since a view keeps all of it alive."""
    storages = [part.untyped_storage() for part in dense_parts(tensor)]
    return {StorageWeakRef(storage).cdata: storage.nbytes() for storage in storages}
