"""Another tensor that is kept in the stead of one that is made of it.

Autograd does not show what an operator read and nobody kept. But a copy, a cast and a repetition hold all of it, so it
can be taken from what they gave: the part is kept, and who wants the whole, or makes another copy, gets it from that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from invact.deriving.rules.operands import signed
from invact.deriving.rules.registry import VIEWS, Node
from invact.pytorch.backward import node_name


class Stead(NamedTuple):
    """A value that stands for what a producer gave.

    Attributes:
        tensor: the value.
        producer, number: whose output it equals, and which of its outputs; None if it equals what `node` itself read,
            but for its type.
        smaller: whether it takes fewer bytes than what was to be kept; else it is the same memory.
    """

    tensor: Tensor
    producer: Node | None
    number: int
    smaller: bool


def stead_of(tensor: Tensor, node: Node, frame: Any) -> Stead | None:
    """What can be kept in the stead of `tensor`, an output of `node`; `frame` is what called its operator."""
    value = tensor.detach()
    name = node_name(node)
    while (undo := _UNDO.get(name)) is not None:
        undone = undo(value, node)
        if undone is None:
            return None
        value, (node, _) = undone, node.next_functions[0]
        if node is None:
            return None
        name = node_name(node)
    part = _PARTS.get(name)
    if part is not None:
        return part(value, node)
    if name == "SoftmaxBackward0" and frame.f_code is _SOFTMAX:
        return _scores(frame.f_locals["input"], tensor)
    if name == "LogSoftmaxBackward0" and tensor.element_size() > 2:
        return _logits(node, frame)
    return None


# --- views, undone ------------------------------------------------------------------------------------


def _unviewed(value: Tensor, node: Node) -> Tensor | None:
    try:
        return value.view(tuple(node._saved_self_sym_sizes))
    except RuntimeError:  # it does not lie so in memory
        return None


def _untransposed(value: Tensor, node: Node) -> Tensor:
    return value.transpose(signed(node._saved_dim0), signed(node._saved_dim1))


def _unpermuted(value: Tensor, node: Node) -> Tensor:
    dims = [dim % value.dim() for dim in signed(tuple(node._saved_dims))]
    return value.permute(sorted(range(len(dims)), key=dims.__getitem__))


_UNDO: dict[str, Callable[[Tensor, Node], Tensor | None]] = {
    "ViewBackward0": _unviewed,
    "UnsafeViewBackward0": _unviewed,
    "TransposeBackward0": _untransposed,
    "PermuteBackward0": _unpermuted,
}


# --- what holds another whole -------------------------------------------------------------------------


def _cast(value: Tensor, node: Node) -> Stead | None:
    """A wide copy of a narrow tensor."""
    producer, number = node.next_functions[0]
    if producer is None:
        return None
    dtype = producer._input_metadata[number].dtype
    if dtype not in _NARROW or value.dtype not in (torch.float32, torch.float64):
        return None
    return Stead(value.to(dtype), producer, number, smaller=True)


def _first(value: Tensor, sizes: tuple[int, ...], producer: Node, number: int) -> Stead | None:
    """The first of what stands there several times."""
    index = (0,) * (value.dim() - len(sizes)) + tuple(slice(0, size) for size in sizes)
    part = value[index]
    return Stead(part.clone(), producer, number, smaller=True) if part.numel() < value.numel() else None


def _repeated(value: Tensor, node: Node) -> Stead | None:
    producer, number = node.next_functions[0]
    return None if producer is None else _first(value, tuple(node._saved_self_sym_sizes), producer, number)


def _copied(value: Tensor, node: Node) -> Stead | None:
    """A copy, of which several may be made; one of an expanded tensor holds it several times."""
    producer, number = node.next_functions[0]
    if producer is None:
        return None
    if node_name(producer) == "ExpandBackward0":
        return _repeated(value, producer)
    return Stead(value, producer, number, smaller=False)


def _scores(scores: Any, probabilities: Tensor) -> Stead | None:
    """What a softmax was given in 16 bits and gave in 32, as attention written out in steps does it."""
    if not isinstance(scores, Tensor) or scores.grad_fn is None or scores.shape != probabilities.shape:
        return None
    if scores.element_size() >= probabilities.element_size() or scores._version:
        return None
    return Stead(scores.detach(), scores.grad_fn, scores.output_nr, smaller=True)


# --- logits, of which a loss makes log-probabilities in 32 bits -----------------------------------------


_MOST_STEPS_TO_LOGITS = 8
_NARROW = (torch.bfloat16, torch.float16)
_SAME_NUMBERS = {"ToCopyBackward0", "CloneBackward0", *VIEWS}


def _logits(node: Node, frame: Any) -> Stead | None:
    """The logits in 16 bits, of which a loss made a wide copy, shifted and flattened it, and took the log_softmax.

    What that was given stands in a variable of who called it, as `F.cross_entropy` has it. It is copied: autograd would
    let everybody change the logits afterwards.
    """
    producer, number = node.next_functions[0]
    if producer is None:
        return None
    read = _in_a_variable(frame, producer, number)
    if read is None and node_name(producer) == "ToCopyBackward0":  # autocast's, which nobody sees
        producer, number = producer.next_functions[0]
        read = None if producer is None else _in_a_variable(frame, producer, number)
    if read is None or read._version:
        return None
    value = read.detach()
    if value.dtype in _NARROW:
        return Stead(value.clone(), producer, number, smaller=True)
    dtype = _narrow_before(producer, number)
    if dtype is None:
        return None
    between = producer
    while (undo := _UNDO.get(node_name(between))) is not None and (undone := undo(value, between)) is not None:
        value, (between, _) = undone, between.next_functions[0]
    if node_name(between) == "ToCopyBackward0" and (cast := _cast(value, between)) is not None:
        return cast
    return Stead(read.detach().to(dtype), None, 0, smaller=True)


def _in_a_variable(frame: Any, producer: Node, number: int) -> Tensor | None:
    for value in list(frame.f_locals.values()):
        if isinstance(value, Tensor) and value.grad_fn is producer and value.output_nr == number:
            return value
    return None


def _narrow_before(producer: Node, number: int) -> torch.dtype | None:
    """The type in 16 bits that has the same numbers as this output."""
    for _ in range(_MOST_STEPS_TO_LOGITS):
        if producer is None:
            return None
        dtype: torch.dtype = producer._input_metadata[number].dtype
        if dtype in _NARROW:
            return dtype
        if node_name(producer) not in _SAME_NUMBERS:
            return None
        producer, number = producer.next_functions[0]
    return None


_SOFTMAX = F.softmax.__code__
_PARTS: dict[str, Callable[[Tensor, Node], Stead | None]] = {
    "ToCopyBackward0": _cast,
    "RepeatBackward0": _repeated,
    "CloneBackward0": _copied,
}
