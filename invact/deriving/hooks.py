"""Looks at each tensor that autograd is about to keep, and keeps a recipe in its stead where there is one.

The hooks hold nothing. Which handle stands for which value is noted, weakly, with the node that made the value, so that
whoever keeps the same value later finds it, in this forward pass or another, and nothing outlives the graph.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from invact.deriving.handles import Bits, Derived, Handle, Kept, remade
from invact.deriving.journal import journal_here
from invact.deriving.parameters import copied, is_parameter, parameters_may_go
from invact.deriving.rules import RULES
from invact.pytorch_inside import FakeTensor, StorageWeakRef, hooks_allowed, outer_hooks, transforms_active

SMALLEST = 1024
"""Elements from which on a tensor is derived: one of fewer bytes than a handful of handles is not worth its recipe."""

MOST_STEPS = 12
"""Operations of one recipe. The longest that pays, a dropped copy of a norm written out in steps, takes seven."""


_PLAIN = (Tensor, FakeTensor)


class NormSettings(NamedTuple):
    """What a norm was told and its node does not know."""

    eps: float | None
    bias: Kept | None


_LAYER_NORM = F.layer_norm.__code__
_NORMS = {getattr(F, name).__code__ for name in ("layer_norm", "rms_norm", "group_norm", "batch_norm")}
# Functions that may work in place, and then keep a copy of what they were given.
_IN_PLACE = {
    getattr(F, name).__code__
    for name in ("silu", "hardswish", "mish", "elu", "selu", "celu", "leaky_relu", "hardtanh", "relu6", "hardsigmoid")
}
_KEEP_THEIR_RESULT = {"ReluBackward0", "SigmoidBackward0", "TanhBackward0", "ExpBackward0"}

# Where the handle of a node's output number i is noted, in the dictionary that autograd has for such notes.
_KEYS = tuple(("invact", number) for number in range(8))


def _key(number: int) -> tuple[str, int]:
    return _KEYS[number] if number < 8 else ("invact", number)


class Deriving:
    """Derives what can be derived of what autograd keeps inside it.

    Args:
        allowed: False keeps everything as it is, in the midst of a part where this is derived.

    Example:
        >>> norm, linear = torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)
        >>> x = torch.randn(32, 64, requires_grad=True)
        >>> with Deriving():
        ...     y = linear(norm(x))
        >>> type(y.grad_fn._raw_saved_mat1.data).__name__  # the norm's output, which the linear layer wants
        'Derived'
    """

    def __init__(self, allowed: bool = True) -> None:
        self.allowed, self.journal = allowed, journal_here()
        self.outer = outer_hooks()
        self.parameters_may_go = parameters_may_go()
        self._hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> Deriving:
        self._hooks = saved_tensors_hooks(self.pack if self.allowed else self.pass_on, remade)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        # Autograd holds `pack` as long as the graph lives: with the hooks this would be a cycle, and through those of a
        # checkpointed region, which hold its inputs, the graph would wait for the garbage collector.
        hooks, self._hooks = self._hooks, None
        assert hooks is not None
        hooks.__exit__(*error)

    # --- what autograd calls ---

    def pack(self, tensor: Tensor) -> Handle:
        """What is kept in the stead of a tensor."""
        frame = sys._getframe(1)
        node = tensor.grad_fn
        if node is None:
            handle = self._without_history(tensor, frame)
        else:
            handle = self._with_history(tensor, node, frame)
        if self.journal is not None:
            self.journal.note(tensor, handle)
        return handle

    def pass_on(self, tensor: Tensor) -> Handle:
        """Keeps a tensor as it is, where nothing is derived."""
        handle = self._kept(tensor)
        handle.source = False
        if self.journal is not None:
            self.journal.note(tensor, handle)
        return handle

    # --- which handle it is ---

    def _kept(self, tensor: Tensor) -> Kept:
        version = tensor._version
        handle = Kept(tensor if tensor.requires_grad and tensor.is_leaf else tensor.detach(), version, self.outer)
        if self.parameters_may_go and is_parameter(tensor):
            copy = copied(tensor)
            handle.source = copy is not None
            if copy is not None:
                handle.apart = Kept(copy, copy._version, self.outer)
        return handle

    def _without_history(self, tensor: Tensor, frame: Any) -> Handle:
        if tensor.dtype is torch.bool and tensor.numel() >= SMALLEST and (bits := self._bits(tensor)) is not None:
            return bits
        handle = self._kept(tensor)
        if frame.f_code in _NORMS and not tensor.requires_grad:
            local = frame.f_locals
            bias = None if frame.f_code is _LAYER_NORM else local.get("bias")  # its node keeps that
            handle.setting = NormSettings(local["eps"], None if bias is None else self._kept(bias))
        return handle

    def _with_history(self, tensor: Tensor, node: Any, frame: Any) -> Handle:
        name = node.name()
        if name == "TBackward0" and _is_weight(node):
            return self._kept(tensor)
        number, version = tensor.output_nr, tensor._version
        metadata, key = node.metadata, _key(number)
        known = _noted(metadata, key)
        if known is not None:
            if known.version != version:
                return self._kept(tensor)  # changed since
            if not isinstance(known, Kept):
                return self._asked_again(known, tensor)
            if known.source:
                known.users += 1
                return known
            return self._kept(tensor)
        handle: Handle | None = None
        if tensor.numel() >= SMALLEST and type(tensor) in _PLAIN and name in RULES:
            if version == 0 or self._worked_in_place(node, name, version):
                handle = self._derived(tensor, node, number, version)
        if handle is None:
            handle = self._kept(tensor)
        if name == "CloneBackward0" and frame.f_code in _IN_PLACE and frame.f_locals["inplace"]:
            handle.made_in_place = frame.f_locals["input"]._version + 1
        metadata[key] = weakref.ref(handle)
        return handle

    def _asked_again(self, known: Handle, tensor: Tensor) -> Handle:
        if isinstance(known, Derived) and known.stride is None:
            known.stride = tensor.stride()
        known.wanted_again()
        return known

    def _worked_in_place(self, node: Any, name: str, version: int) -> bool:
        """Whether this is the output of an operator that works in place, and not changed since."""
        if name in _KEEP_THEIR_RESULT:
            return node._raw_saved_result.data is None  # it is about to keep it, and has just made it
        operand = getattr(node, "_raw_saved_self", None)
        kept = None if operand is None else operand.data
        return isinstance(kept, Kept | Derived) and kept.made_in_place == version

    def _derived(self, tensor: Tensor, node: Any, number: int, version: int) -> Handle | None:
        handle = RULES[node.name()](node, number, self._find)
        if handle is None:
            handle = self._narrow(tensor, node)
        if handle is None or handle.steps > MOST_STEPS:
            return None
        if self.journal is not None:
            self.journal.recipe(handle, node, number)
        handle.version, handle.stride = version, tensor.stride()
        handle.wanted_again()
        return handle

    def _find(self, node: Any, number: int) -> Handle | None:
        """The handle of an output: noted, a parameter, or by a recipe of its own."""
        metadata, key = node.metadata, _key(number)
        known = _noted(metadata, key)
        if known is not None:
            return (known.apart or known if known.source else None) if isinstance(known, Kept) else known
        name = node.name()
        if name == "torch::autograd::AccumulateGrad":  # of one that may go nobody knows whether it is still there
            return None if self.parameters_may_go else self._kept(node.variable)
        rule = RULES.get(name)
        handle = rule(node, number, self._find) if rule is not None else None
        if handle is None or handle.steps > MOST_STEPS:
            return None
        if self.journal is not None:
            self.journal.recipe(handle, node, number)
        metadata[key] = weakref.ref(handle)
        return handle

    def _narrow(self, tensor: Tensor, node: Any) -> Derived | None:
        """A wide copy of a narrow tensor is kept narrow, and with it whoever else wants the narrow one."""
        if node.name() != "ToCopyBackward0":
            return None
        producer, output = node.next_functions[0]
        dtype, wide = producer._input_metadata[output].dtype, tensor.dtype
        if dtype not in (torch.bfloat16, torch.float16) or wide not in (torch.float32, torch.float64):
            return None
        narrow = Kept(tensor.detach().to(dtype), 0, self.outer)
        narrow.narrow = True
        producer.metadata[_key(output)] = weakref.ref(narrow)
        return Derived(lambda x: x.to(wide), (narrow,), joins=False, moves=True)

    def _bits(self, mask: Tensor) -> Handle | None:
        dense = mask.is_contiguous() or mask.is_contiguous(memory_format=torch.channels_last)
        if not dense or mask.untyped_storage().nbytes() != mask.numel() or type(mask) not in _PLAIN:
            return None
        known = _MASKS.get(mask.untyped_storage()._cdata)
        if known is not None:
            storage, reference = known
            handle = reference()
            if handle is not None and not storage.expired() and handle.version == mask._version and handle.fits(mask):
                return handle
        handle = Bits(mask, mask._version, self.outer)
        key = mask.untyped_storage()._cdata

        def forget(_: Any) -> None:
            _MASKS.pop(key, None)

        _MASKS[key] = StorageWeakRef(mask.untyped_storage()), weakref.ref(handle, forget)
        return handle


# By the identity of its storage, the bits of a mask that several keep; it has no node on which to note them.
_MASKS: dict[int, tuple[StorageWeakRef, weakref.ref[Bits]]] = {}


def _noted(metadata: dict[Any, Any], key: tuple[str, int]) -> Handle | None:
    reference = metadata.get(key)
    return None if reference is None else reference()


def _is_weight(node: Any) -> bool:
    producer = node.next_functions[0][0]
    return producer is not None and producer.name() == "torch::autograd::AccumulateGrad"


def may_derive() -> bool:
    """Whether hooks can be set where this is called: not while a graph is traced, nor inside torch.func."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return hooks_allowed() and not transforms_active() and not torch.jit.is_tracing()


def is_deriving(allowed: bool) -> bool:
    """Whether the innermost hooks are ours."""
    hooks = outer_hooks()
    ours = getattr(hooks[0], "__self__", None) if hooks else None
    return isinstance(ours, Deriving) and ours.allowed == allowed
