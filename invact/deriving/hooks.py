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

from invact.deriving.handles import Awaited, Bits, Derived, Handle, Kept, remade
from invact.deriving.journal import journal_here
from invact.deriving.rules import RULES, VIEWS
from invact.deriving.stead import stead_of
from invact.pytorch_inside import FakeTensor, StorageWeakRef, hooks_allowed, outer_hooks, transforms_active

SMALLEST = 1024
"""Elements from which on a tensor is derived: one of fewer bytes than a handful of handles is not worth its recipe."""

MOST_STEPS = 12
"""Operations of one recipe. The longest that pays, a dropped copy of a norm written out in steps, takes seven."""


_PLAIN = (Tensor, FakeTensor)


class NormSettings(NamedTuple):
    """What a norm was told and its node does not know."""

    eps: float | None
    bias: Handle | None


_NORMS = {getattr(F, name).__code__ for name in ("layer_norm", "rms_norm", "group_norm", "batch_norm")}
# Functions that may work in place, and then keep a copy of what they were given.
_IN_PLACE = {
    getattr(F, name).__code__
    for name in ("silu", "hardswish", "mish", "elu", "selu", "celu", "leaky_relu", "hardtanh", "relu6", "hardsigmoid")
}
_KEEP_THEIR_RESULT = {"ReluBackward0", "SigmoidBackward0", "TanhBackward0", "ExpBackward0"}

# Where the handle of a node's output number i is noted, in the dictionary that autograd has for such notes.
_KEYS = tuple(("invact", number) for number in range(8))


_NOTHING = (None, None)


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
        # What one pair of hooks has kept is nothing for another: a checkpoint counts what it is shown, and shows others
        # when it runs a region anew.
        self._realm = None if self.outer is None else weakref.ref(self.outer[0])
        self._hooks = saved_tensors_hooks(self.pack if allowed else self.pass_on, remade)

    def __enter__(self) -> Deriving:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        del self._hooks  # they refer to this, which would wait for the garbage collector, and the hooks outside with it

    # --- what autograd calls ---

    def pack(self, tensor: Tensor) -> Handle:
        """What is kept in the stead of a tensor."""
        node = tensor.grad_fn
        if node is None:
            handle = self._without_history(tensor, sys._getframe(1))
        elif tensor.numel() < SMALLEST or type(tensor) not in _PLAIN or (name := node.name()) == "TBackward0":
            # The last are the weights of linear layers.
            handle = Kept(tensor.detach(), tensor._version, self.outer)
        else:
            handle = self._with_history(tensor, node, name, sys._getframe(1))
        if self.journal is not None:
            self.journal.note(tensor, handle)
        return handle

    def pass_on(self, tensor: Tensor) -> Handle:
        """Keeps a tensor as it is, where nothing is derived."""
        handle = self._kept(tensor)
        handle.may_be_read = False
        if self.journal is not None:
            self.journal.note(tensor, handle)
        return handle

    # --- which handle it is ---

    def _kept(self, tensor: Tensor, asked: int = 1) -> Kept:
        """An output without its history, or a leaf, such as a parameter, as it is."""
        has_history = tensor.grad_fn is not None or not tensor.requires_grad
        return Kept(tensor.detach() if has_history else tensor, tensor._version, self.outer, asked)

    def _without_history(self, tensor: Tensor, frame: Any) -> Handle:
        if tensor.requires_grad:
            return Kept(tensor, tensor._version, self.outer)
        if tensor.dtype is torch.bool and tensor.numel() >= SMALLEST and (bits := self._bits(tensor)) is not None:
            return bits
        handle = Kept(tensor.detach(), tensor._version, self.outer)
        if frame.f_code in _NORMS:
            local = frame.f_locals
            bias = local.get("bias")
            handle.setting = NormSettings(local["eps"], None if bias is None else self._kept(bias, asked=0))
        return handle

    def _with_history(self, tensor: Tensor, node: Any, name: str, frame: Any) -> Handle:
        number, version = tensor.output_nr, tensor._version
        metadata = node.metadata
        known = self._noted(metadata, _key(number))
        if known is not None:
            return self._known(known, tensor, version)
        handle: Handle | None = None
        if _made_by_a_rule(node, name) and (version == 0 or self._worked_in_place(node, name, version)):
            handle = self._derived(tensor, node, number, version, frame)
        if handle is None:
            handle = self._kept(tensor)
        if name == "CloneBackward0" and frame.f_code in _IN_PLACE and frame.f_locals["inplace"]:
            handle.made_in_place = frame.f_locals["input"]._version + 1
        self._note(metadata, number, handle)
        return handle

    def _known(self, known: Handle, tensor: Tensor, version: int) -> Handle:
        """The handle of a value that somebody else has kept before."""
        if known.version != version or not known.may_be_read:
            return self._kept(tensor)  # changed since, or not to be shared
        if isinstance(known, Kept):
            if known.lies_like(tensor):
                known.asked += 1
                return known
            known = Derived(torch.clone, (known,), joins=False, moves=True)
        if isinstance(known, Derived) and known.stride is None:
            known.stride = tensor.stride()
        known.wanted_again()
        return known

    def _note(self, metadata: dict[Any, Any], number: int, handle: Handle) -> None:
        metadata[_key(number)] = weakref.ref(handle), self._realm
        for waiting, realm in metadata.pop(("invact awaited", number), ()):
            awaited = waiting()
            if awaited is not None and realm == self._realm:
                awaited.filled(handle)

    def _noted(self, metadata: dict[Any, Any], key: tuple[str, int]) -> Handle | None:
        reference, realm = metadata.get(key, _NOTHING)
        return None if reference is None or realm != self._realm else reference()

    def _worked_in_place(self, node: Any, name: str, version: int) -> bool:
        """Whether this is the output of an operator that works in place, and not changed since."""
        if name in _KEEP_THEIR_RESULT:
            return node._raw_saved_result.data is None  # it is about to keep it, and has just made it
        operand = getattr(node, "_raw_saved_self", None)
        kept = None if operand is None else operand.data
        return isinstance(kept, Kept | Derived) and kept.made_in_place == version

    def _derived(self, tensor: Tensor, node: Any, number: int, version: int, frame: Any) -> Handle | None:
        rule = RULES[node.name()]
        handle = rule(node, number, self._find)
        if handle is None and (stead := stead_of(tensor, node, frame)) is not None:
            kept = Kept(stead.tensor, stead.tensor._version, self.outer, asked=0)
            kept.stands_for_another = True
            self._note(stead.producer.metadata, stead.number, kept)
            if stead.smaller:
                handle = rule(node, number, self._find)
            else:
                same = self._kept(tensor)
                same.beside = kept
                return same
        if handle is None:
            return self._later(tensor, node, number)
        if handle.steps > MOST_STEPS:
            return None
        if self.journal is not None:
            self.journal.recipe(handle, node, number)
        handle.version, handle.stride = version, tensor.stride()
        handle.wanted_again()
        return handle

    def _find(self, node: Any, number: int) -> Handle | None:
        """The handle of an output: noted, a parameter, or by a recipe of its own."""
        metadata, key = node.metadata, _key(number)
        known = self._noted(metadata, key)
        if known is not None:
            return known if known.may_be_read else None
        name = node.name()
        if name == "torch::autograd::AccumulateGrad":
            return self._kept(node.variable, asked=0)
        rule = RULES.get(name)
        handle = rule(node, number, self._find) if rule is not None else None
        if handle is None or handle.steps > MOST_STEPS:
            return None
        if self.journal is not None:
            self.journal.recipe(handle, node, number)
        metadata[key] = weakref.ref(handle), self._realm
        return handle

    def _later(self, tensor: Tensor, node: Any, number: int) -> Kept | None:
        """Keeps a tensor until somebody keeps what it can be made of, as `x * sigmoid(x)` does, the sigmoid first."""
        recipe = RULES[node.name()](node, number, self._find_or_await)
        if recipe is None or recipe.joins or not 0 < recipe.steps <= MOST_STEPS:
            return None
        kept = self._kept(tensor)
        recipe.stride = tensor.stride()
        kept.later = recipe
        if self.journal is not None:
            self.journal.recipe(recipe, node, number)
        for awaited in recipe.awaited():
            awaited.kept = weakref.ref(kept)
        return kept

    def _find_or_await(self, node: Any, number: int) -> Handle | None:
        """`_find`, or in its stead what waits until the output is kept."""
        found = self._find(node, number)
        if found is not None:
            return found
        rule = RULES.get(node.name())
        if rule is not None:
            handle = rule(node, number, self._find_or_await)
            if isinstance(handle, Derived) and not handle.steps and handle.awaited():
                return self._await(node, number)
            if handle is not None and self.journal is not None:
                self.journal.recipe(handle, node, number)
            return handle
        return self._await(node, number)

    def _await(self, node: Any, number: int) -> Awaited:
        awaited = Awaited()
        node.metadata.setdefault(("invact awaited", number), []).append((weakref.ref(awaited), self._realm))
        return awaited

    def _bits(self, mask: Tensor) -> Handle | None:
        dense = mask.is_contiguous() or mask.is_contiguous(memory_format=torch.channels_last)
        if not dense or mask.untyped_storage().nbytes() != mask.numel() or type(mask) not in _PLAIN:
            return None
        known = _MASKS.get(mask.untyped_storage()._cdata)
        if known is not None:
            storage, reference, realm = known
            handle = reference()
            if (
                handle is not None
                and realm == self._realm
                and not storage.expired()
                and handle.version == mask._version
                and handle.fits(mask)
            ):
                return handle
        handle = Bits(mask, mask._version, self.outer)
        key = mask.untyped_storage()._cdata

        def forget(_: Any) -> None:
            _MASKS.pop(key, None)

        _MASKS[key] = StorageWeakRef(mask.untyped_storage()), weakref.ref(handle, forget), self._realm
        return handle


# By the identity of its storage, the bits of a mask that several keep; it has no node on which to note them.
_MASKS: dict[int, tuple[StorageWeakRef, weakref.ref[Bits], weakref.ref[Any] | None]] = {}


def _made_by_a_rule(node: Any, name: str) -> bool:
    """Whether there is a rule for what made the tensor that this is a view of: for most that are kept there is none."""
    while name in VIEWS:
        node = node.next_functions[0][0]
        if node is None:
            return False
        name = node.name()
    return name in RULES


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
