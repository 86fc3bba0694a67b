"""Sums and differences, of what is there without another sum on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from invact.deriving.handles import Derived, Handle
from invact.deriving.rules.operands import derived, operand, settings
from invact.deriving.rules.registry import SUMS, Find, Node, Rule, register


def _sum(operator: Callable[..., Tensor], *names: str, summands: int, **settings_of: str) -> Rule:
    """A sum, only of what is there without another one on the way: else a residual stream would be summed up from its
    start. Its first few operands are the `summands`."""

    def rule(node: Node, number: int, find: Find) -> Derived | None:
        read = [operand(node, name, edge, find) for edge, name in enumerate(names)]
        if any(not isinstance(each, Handle) or each.joins for each in read[:summands]):
            return None
        chosen = dict(zip(settings_of, settings(node, *settings_of.values()), strict=True))
        return derived(functools.partial(operator, **chosen), *read, joins=True)

    return rule


register("AddBackward0", among=SUMS)(_sum(torch.add, "self", "other", summands=2, alpha="alpha"))
register("SubBackward0", among=SUMS)(_sum(torch.sub, "self", "other", summands=2, alpha="alpha"))
register("AddcdivBackward0", among=SUMS)(_sum(torch.addcdiv, "self", "tensor1", "tensor2", summands=1, value="value"))
register("AddcmulBackward0", among=SUMS)(_sum(torch.addcmul, "self", "tensor1", "tensor2", summands=1, value="value"))
register("LerpBackward0", among=SUMS)(_sum(torch.lerp, "self", "end", summands=2, weight="weight"))
register("LerpBackward1", among=SUMS)(_sum(torch.lerp, "self", "end", "weight", summands=2))
