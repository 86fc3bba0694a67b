"""What an RMS norm in steps costs: the bytes that its operators move, and how far its roundings take it off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invact.pytorch.containers import tree_leaves
from invact.pytorch.modes import TorchDispatchMode
from invact.recognition.bare_copies import output_of
from invact.recognition.curves import Rounding
from invact.recognition.norms_in_steps import FoundNorm, normal_numbers, with_known_weight


def own_rounding_of(found: FoundNorm, dtype: torch.dtype) -> Rounding:
    """How the module's own steps in 16 bits and the norm rounded once differ from float64, over x ~ N(0, 1)."""
    with torch.no_grad(), torch.device("cpu"):
        bare, weight = with_known_weight(found.computes, found.fusion.norm.weight, dtype)
        x = normal_numbers((4, 15, weight.numel()), seed=1).to(dtype)
        exact = found.fusion.norm.in_float64(x, weight)
        steps, once = output_of(bare, x.clone()), exact.to(dtype)
    own_error, once_error = (((y.double() - exact).norm() / exact.norm()).item() for y in (steps, once))
    return Rounding(own_error, once_error)


def accesses_in_steps(found: FoundNorm, dtype: torch.dtype) -> float:
    """Bytes that the module's own operators read and write for each element, forward and backward."""
    with torch.enable_grad(), torch.device("cpu"):
        bare, weight = with_known_weight(found.computes, found.fusion.norm.weight, dtype)
        x = normal_numbers((4, 15, weight.numel()), seed=1).to(dtype).requires_grad_()
        with _Accesses() as accesses:
            y = output_of(bare, x)
            y.backward(torch.ones_like(y))
    nbytes: float = accesses.nbytes / x.numel()
    return nbytes


class _Accesses(TorchDispatchMode):
    """Bytes that operators read and write, views left out."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func not in _MOVE_NOTHING:
            tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
            self.nbytes += sum(each.untyped_storage().nbytes() for each in tensors)
        return out


_MOVE_NOTHING = (torch.ops.aten.detach.default, torch.ops.aten.ones_like.default)
