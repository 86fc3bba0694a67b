"""Tensors as they were noted: numbers, gradients and hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from invact.pytorch.tensors import changes_in_place, plain_parts


@dataclass(slots=True)
class NotedTensor:
    """A tensor's gradient, hooks and whether it asks for one, and its numbers unless `copies` is False."""

    owner: Tensor
    requires_grad: bool
    grad: Tensor | None
    hooks: Any
    same_storage: Tensor | None  # notices `tensor.data = other`
    copied: Tensor | None
    version: int

    @classmethod
    def of(cls, owner: Tensor, *, copies: bool) -> NotedTensor:
        plain = type(owner) in _PLAIN
        return cls(
            owner,
            owner.requires_grad,
            owner.grad if owner.is_leaf else None,
            owner._backward_hooks,
            owner.detach() if plain else None,
            owner.detach().clone() if copies and not owner.is_meta else None,
            changes_in_place(owner),
        )

    def put_back(self) -> None:
        owner, storage = self.owner, self.same_storage
        if storage is not None and not _same_place(owner, storage):
            owner.data = storage
        if self.copied is not None and not self._same_numbers():
            self._numbers_put_back(self.copied)
        if owner.is_leaf:
            self._leaf_put_back()
        if type(owner) is nn.Parameter and self.copied is None and changes_in_place(owner) != self.version:
            raise RuntimeError(
                f"The model's forward changed in place a parameter of shape {tuple(owner.size())} that it reaches by "
                "another way than its place in the module, so a simulated forward really changed it. Load the weights "
                "again, and let forward reach the parameter as an attribute of its module."
            )

    def _same_numbers(self) -> bool:
        if self.same_storage is None:  # comparing the parts of a DTensor would have to ask other processes
            return changes_in_place(self.owner) == self.version
        now, then = plain_parts(self.owner.detach()), plain_parts(cast(Tensor, self.copied))
        if now is None or then is None:
            return changes_in_place(self.owner) == self.version
        return len(now) == len(then) and all(map(torch.equal, now, then))

    def _numbers_put_back(self, copied: Tensor) -> None:
        data = self.owner.data  # not the owner: no graph that kept it is to think it changed once more
        now, then = plain_parts(data), plain_parts(copied)
        if data.layout is torch.strided or now is None or then is None:
            data.copy_(copied)
        elif [part.size() for part in now] == [part.size() for part in then]:
            for part, was in zip(now, then, strict=True):
                part.copy_(was)
        else:
            self.owner.data = copied

    def _leaf_put_back(self) -> None:
        owner = self.owner
        if owner.requires_grad is not self.requires_grad:
            owner.requires_grad_(self.requires_grad)
        if owner.grad is not self.grad:
            owner.grad = self.grad
        if owner._backward_hooks is not self.hooks:
            owner._backward_hooks = self.hooks


_PLAIN = (Tensor, nn.Parameter, nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)


def _same_place(one: Tensor, other: Tensor) -> bool:
    if any(each.layout is not torch.strided or each.is_nested for each in (one, other)):
        return one.layout is other.layout and one.is_nested is other.is_nested
    return bool(
        one.size() == other.size()  # .shape is refused where a lazy layer has none yet
        and one.dtype is other.dtype
        and one.device == other.device
        and one.stride() == other.stride()
        and one.storage_offset() == other.storage_offset()
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )
