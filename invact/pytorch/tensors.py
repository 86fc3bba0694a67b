"""What lies behind a tensor: its storage, how often it was changed, the tensors inside it, its strides."""

from __future__ import annotations

import torch
from torch import Tensor

from invact.pytorch.version_check import found, names_missing

try:
    # How a kernel lays its output out, given an input in part of a channels-last tensor, which is_contiguous does not
    # tell: a reshape after batch norm would be counted as a copy where it is none.
    # make_contiguous_strides_for: the layout of a copy that is made again; kernels would round differently in another.
    from torch._prims_common import make_contiguous_strides_for, suggest_memory_format

    # A storage's identity, and whether it still lives: without it the ledger would count some storages twice.
    from torch.multiprocessing.reductions import StorageWeakRef

    # Tells tensors that hold others, such as DTensor: they would count as nothing.
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass
except ImportError as _error:
    raise names_missing(_error) from _error
found(Tensor, "_version")
found(torch.UntypedStorage, "_cdata")
found(Tensor, "_backward_hooks")


def changes_in_place(tensor: Tensor) -> int:
    """How often a tensor was changed in place; an activation whose output is changed later must be kept."""
    return 0 if tensor.is_inference() else tensor._version


def storage_identity(tensor: Tensor) -> int:
    """What `StorageWeakRef.cdata` is, without making one: the recording of a pass asks for it at every operator."""
    identity: int = tensor.untyped_storage()._cdata
    return identity


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of a sparse tensor as they are stored; the public methods refuse what is not coalesced."""
    return tensor._indices(), tensor._values()


def plain_parts(tensor: Tensor) -> list[Tensor] | None:
    """The strided tensors that hold a tensor's numbers and say where they stand; None if it does not show them."""
    if tensor.layout is torch.sparse_coo:
        return list(sparse_parts(tensor))
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.layout is not torch.strided:
        return None
    if tensor.is_nested:
        return list(tensor.unbind())
    return [tensor.int_repr()] if tensor.is_quantized else [tensor]


__all__ = [
    "StorageWeakRef",
    "changes_in_place",
    "is_traceable_wrapper_subclass",
    "make_contiguous_strides_for",
    "plain_parts",
    "sparse_parts",
    "storage_identity",
    "suggest_memory_format",
]
