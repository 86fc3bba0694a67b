"""A count of what is kept for backward that needs no module: of single functions, and under torch.compile."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from invact.ledger.entries import Key
from invact.ledger.storages import storage_sizes


class KeptStorages:
    """Counts what is packed for backward inside it, where the ledger's dispatch mode would make a compiled model
    run eagerly.

    Args:
        left_out: tensors that are there in any case, such as a model's parameters and buffers.

    Example:
        >>> import torch
        >>> x = torch.ones(8, requires_grad=True)
        >>> with KeptStorages() as kept:
        ...     y = torch.nn.functional.gelu(x)
        >>> kept.nbytes()
        32
    """

    def __init__(self, left_out: Iterable[Tensor] = ()) -> None:
        self._left_out = {key for tensor in left_out for key in storage_sizes(tensor)}
        self._kept: list[Tensor] = []
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> KeptStorages:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def sizes(self) -> dict[Key, int]:
        """Bytes of each storage that was packed."""
        found = {key: size for tensor in self._kept for key, size in storage_sizes(tensor).items()}
        return {key: size for key, size in found.items() if key not in self._left_out}

    def nbytes(self) -> int:
        return sum(self.sizes().values())

    def _pack(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor.detach())
        return tensor
