"""Softmax and its logarithm."""

from __future__ import annotations

import torch

from invact.deriving.handles import Derived
from invact.deriving.log_probabilities import LogProbabilities
from invact.deriving.rules.operands import derived, produced, settings
from invact.deriving.rules.registry import Find, Node, register

aten = torch.ops.aten


@register("SafeSoftmaxBackward0")
def safe_softmax(node: Node, number: int, find: Find) -> Derived | None:
    (dim,), dtype = settings(node, "dim"), node._input_metadata[0].dtype
    return derived(lambda x: aten._safe_softmax(x, dim, dtype), produced(node, 0, find))


@register("SoftmaxBackward0")
def softmax(node: Node, number: int, find: Find) -> Derived | None:
    (dim,), dtype = settings(node, "dim"), node._input_metadata[0].dtype
    return derived(lambda x: torch.softmax(x, dim, dtype=dtype), produced(node, 0, find))


@register("LogSoftmaxBackward0")
def log_softmax(node: Node, number: int, find: Find) -> Derived | None:
    (dim,), dtype = settings(node, "dim"), node._input_metadata[0].dtype
    logits = produced(node, 0, find)
    return None if logits is None else LogProbabilities(lambda x: torch.log_softmax(x, dim, dtype=dtype), logits)
