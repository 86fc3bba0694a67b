"""Looks at each tensor that autograd is about to keep, and keeps a recipe in its stead where there is one.

The hooks hold nothing. Which handle stands for which value is noted, weakly, with the node that made the value, so that
whoever keeps the same value later finds it, in this forward pass or another, and nothing outlives the graph.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from invact.deriving.handles import MOST_STEPS, Derived, Handle, Kept
from invact.deriving.layouts import PLAIN, is_plain
from invact.deriving.masks import bits_of
from invact.deriving.norm_settings import NORMS, STATISTICS_WITH_HISTORY, TOLD_IN_THEIR_CALL, norm_settings
from invact.deriving.rules.padding import FILLED
from invact.deriving.rules.registry import ON_THE_WAY, RULES, SUMS, VIEWS
from invact.deriving.saved_by_node import kept_by, kept_something
from invact.deriving.searching import FOUND, MOST_SEARCHED, Search
from invact.deriving.stand_ins import stead_of
from invact.deriving.unpacking import remade
from invact.pytorch.backward import node_name
from invact.pytorch.circumstances import transforms_active
from invact.pytorch.saved_tensor_hooks import hooks_allowed, outer_hooks, shows_what_is_kept

SMALLEST = 1024
"""Elements from which on a tensor is derived: one of fewer bytes than a handful of handles is not worth its recipe."""

_DROPOUT = F.dropout.__code__

# Functions that may work in place, and then keep a copy of what they were given.
_IN_PLACE = {
    getattr(F, name).__code__
    for name in ("silu", "hardswish", "mish", "elu", "selu", "celu", "leaky_relu", "hardtanh", "relu6", "hardsigmoid")
}

_KEEP_THEIR_RESULT = {
    *("ReluBackward0", "SigmoidBackward0", "TanhBackward0", "ExpBackward0", "Expm1Backward0", "SqrtBackward0"),
    *("RsqrtBackward0", "ReciprocalBackward0", "LeakyReluBackward1", "EluBackward1", "CeluBackward1"),
}

_OF_TWO = ("AddBackward0", "SubBackward0")


class Deriving(Search):
    """Derives what can be derived of what autograd keeps inside it.

    Args:
        allowed: False keeps everything as it is, in the midst of a part where this is derived.
        module: runs inside; what lies in its buffers and parameters is there anyway.

    Known limitations:
        - What an operator without a rule gave is kept (`register` adds one), and so is what would be
          made of something that nobody keeps, or in more than `MOST_STEPS` operations.
        - What autograd does not record is not to be had: the number in `x + 1.0`, a norm's eps where the norm was
          called by other ways than `torch.nn.functional`.
        - Tensors of fewer than `SMALLEST` elements, sparse and nested ones and those of other classes are kept.
        - The hooks stand aside while a graph is traced or compiled, and inside torch.func; see `may_derive`.
        - PyTorch gives a function written in Python another tensor than it has kept, wherever there are hooks: of the
          same value, without the attributes that somebody has set on it.

    Example:
        >>> norm, linear = torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)
        >>> x = torch.randn(32, 64, requires_grad=True)
        >>> with Deriving():
        ...     y = linear(norm(x))
        >>> type(kept_by(y.grad_fn, "mat1")).__name__  # the norm's output, which the linear layer wants
        'Derived'
    """

    def __init__(self, allowed: bool = True, module: nn.Module | None = None) -> None:
        super().__init__()
        self.allowed = allowed
        self._module = None if module is None else weakref.ref(module)  # which may hold a graph, as the graph does us
        self._weights: set[int] | None = None
        self._hooks = saved_tensors_hooks(self.pack if allowed else self.pass_on, remade)

    def __enter__(self) -> Deriving:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        del self._hooks  # which hold a method of ours: a cycle, with the journal and the hooks outside in it

    # --- what autograd calls ---

    def pack(self, tensor: Tensor) -> Handle:
        """What is kept in the stead of a tensor."""
        if not shows_what_is_kept:
            kept_something(tensor)
        node = tensor.grad_fn
        if node is None:
            handle = self._kept(tensor) if tensor.requires_grad else self._constant(tensor, sys._getframe(1))
        elif tensor.numel() < SMALLEST or (name := node_name(node)) == "TBackward0" or not is_plain(tensor):
            # Of that name are the weights of linear layers.
            handle = self._kept(tensor)
            if tensor.output_nr:
                self._tell_of_norm(handle, node, sys._getframe(1))
        else:
            handle = self._with_history(tensor, node, name, sys._getframe(1))
        if self.journal is not None:
            self.journal.note(tensor, handle, self._why_kept(tensor) if type(handle) is Kept else "")
        return handle

    def pass_on(self, tensor: Tensor) -> Handle:
        """Keeps a tensor as it is, where nothing is derived."""
        handle = self._kept(tensor)
        handle.may_be_read = False
        if self.journal is not None:
            self.journal.note(tensor, handle, "left out by include or exclude")
        return handle

    # --- which handle it is ---

    def _constant(self, tensor: Tensor, frame: Any) -> Handle:
        """Of what has neither history nor gradient, such as masks and the statistics of norms."""
        if tensor.dtype is torch.bool and tensor.numel() >= SMALLEST and is_plain(tensor):
            dropped = frame.f_code is _DROPOUT  # by a mask that is nobody else's
            bits = None if not dropped and self._is_weight(tensor) else bits_of(tensor, self.outer, shared=not dropped)
            if bits is not None:
                return bits
        handle = Kept(tensor, tensor._version, self.outer)
        told = NORMS.get(frame.f_code)
        if told is not None:
            handle.setting = norm_settings(frame, told, self._kept)
        return handle

    def _is_weight(self, mask: Tensor) -> bool:
        """Whether it lies in a buffer or parameter, which is there anyway."""
        if self._weights is None:
            module = None if self._module is None else self._module()
            weights = () if module is None else itertools.chain(module.buffers(), module.parameters())
            self._weights = {each.untyped_storage()._cdata for each in weights if is_plain(each)}
        return mask.untyped_storage()._cdata in self._weights

    def _tell_of_norm(self, handle: Handle, node: Any, frame: Any) -> None:
        """Its statistics have a history, as those of the fused RMS norm have, and no other norm's."""
        told = NORMS.get(frame.f_code)
        if told is not None and isinstance(handle, Kept) and node_name(node) in STATISTICS_WITH_HISTORY:
            handle.setting = norm_settings(frame, told, self._kept)

    def _with_history(self, tensor: Tensor, node: Any, name: str, frame: Any) -> Handle:
        number, version = tensor.output_nr, tensor._version
        metadata = node.metadata
        known = self._noted(metadata, (FOUND, number))
        if known is not None:
            return self._known(known, tensor, name, version)
        handle: Handle | None = None
        if _made_by_a_rule(node, name) and (version == 0 or self._worked_in_place(node, name, version)):
            handle = self._derived(tensor, node, number, version, frame)
        if handle is None and self._parts_wait:
            handle = self._part_of_what_is_awaited(tensor, node, number)
        if handle is None:
            handle = self._kept(tensor)
            if number:
                self._tell_of_norm(handle, node, frame)
        if name == "CloneBackward0" and frame.f_code in _IN_PLACE and frame.f_locals["inplace"]:
            handle.made_in_place = frame.f_locals["input"]._version + 1
        self._note(metadata, number, handle)
        return handle

    def _known(self, known: Handle, tensor: Tensor, name: str, version: int) -> Handle:
        """The handle of a value that somebody else has kept before."""
        if known.version != version or not known.may_be_read:
            return self._kept(tensor)  # changed since, or not to be shared
        if known.unsure and not self._laid_out_alike(known, tensor, name):
            return self._kept(tensor)
        if isinstance(known, Kept):
            if known.lies_like(tensor):
                known.asked_once_more()
                return known
            known = Derived(torch.clone, (known,), joins=False, moves=True)
            if self.journal is not None:
                self.journal.recipe(known, tensor.grad_fn, tensor.output_nr)
        if isinstance(known, Derived):
            known.stride = tensor.stride()  # a step on the way did not know it
        known.wanted_again()
        return known

    def _worked_in_place(self, node: Any, name: str, version: int) -> bool:
        """Whether this is the output of an operator that works in place, and not changed since."""
        if name in _KEEP_THEIR_RESULT:
            return not isinstance(kept_by(node, "result"), Handle)  # it is about to keep it, and has just made it
        kept = kept_by(node, "self")
        return isinstance(kept, Kept | Derived) and kept.made_in_place == version

    def _derived(self, tensor: Tensor, node: Any, number: int, version: int, frame: Any) -> Handle | None:
        """A recipe for a tensor, or what waits for what it reads, or None.

        A layer norm's output is made by its rule, of what the norm keeps itself. A product `silu(g) * u` waits: g and u
        are kept in a moment, by the very product that asks. What was made of a 32-bit copy of a 16-bit tensor, which
        nobody keeps, is made of the narrow one, kept in the copy's stead.
        """
        name = node_name(node)
        if name in _OF_TWO and any(self._is_surely_not_at_hand(*edge) for edge in node.next_functions):
            return self._later(tensor, node, number)
        rule, self._left = RULES[name], MOST_SEARCHED
        handle = FILLED[name](tensor, node, self._find) if name in FILLED else rule(node, number, self._find)
        if handle is None and (stead := stead_of(tensor, node, frame)) is not None:
            kept = Kept(stead.tensor, stead.tensor._version, self.outer)
            kept.stands_for_another = True
            if stead.producer is not None:
                self._note(stead.producer.metadata, stead.number, kept)
                self._token = object()  # what was not found before may be now
            if not stead.smaller:
                same = self._kept(tensor)
                same.beside = kept
                return same
            handle = rule(node, number, self._find if stead.producer is not None else _finds_wide(kept, tensor.dtype))
        if handle is None:
            return self._later(tensor, node, number)
        if not self._can_be_run(handle) or (handle.unsure and not self._laid_out_alike(handle, tensor, name)):
            return None
        if self.journal is not None:
            self.journal.recipe(handle, node, number)
        handle.version, handle.stride = version, tensor.stride()
        handle.wanted_again()
        return handle

    def _why_kept(self, tensor: Tensor) -> str:
        """For the plan, of a tensor that is kept."""
        node = tensor.grad_fn
        if tensor.numel() < SMALLEST:
            return f"of fewer than {SMALLEST} elements"
        if node is None:
            return "without a gradient there is no graph that tells how it was made"
        if not is_plain(tensor):
            kind = f"a {type(tensor).__name__}" if type(tensor) not in PLAIN else "sparse or nested"
            return f"{kind}, which has rules of its own"
        if node_name(node) not in RULES:
            return "there is no recipe for that operator"
        if tensor._version and not self._worked_in_place(node, node_name(node), tensor._version):
            return "changed in place"
        self._left = MOST_SEARCHED
        recipe = RULES[node_name(node)](node, tensor.output_nr, self._find)
        if recipe is not None:
            return f"its recipe would take more than {MOST_STEPS} steps" if recipe.steps > MOST_STEPS else ""
        if node_name(node) in TOLD_IN_THEIR_CALL:
            return "it takes numbers that autograd does not record"
        if node_name(node) in SUMS:
            return "it would be added up from another sum that is not kept, and so on"
        return "what it would be made again from is not kept either"


def _made_by_a_rule(node: Any, name: str) -> bool:
    """Whether there is a rule for what made the tensor that this is a view of: for most that are kept there is none."""
    while name in VIEWS:
        node = node.next_functions[0][0]
        if node is None:
            return False
        name = node_name(node)
    return name in RULES and name not in ON_THE_WAY


def _finds_wide(narrow: Kept, dtype: torch.dtype) -> Any:
    """Finds, whatever a rule for an operator of one tensor looks for, this in another type."""
    wide = Derived(lambda x: x.to(dtype), (narrow,), joins=False, moves=True)
    return lambda producer, number: wide


def may_derive() -> bool:
    """Whether hooks can be set where this is called: not while a graph is traced, nor inside torch.func."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return hooks_allowed() and not transforms_active() and not torch.jit.is_tracing()  # type: ignore[attr-defined]


def is_deriving(allowed: bool) -> bool:
    """Whether the innermost hooks are ours, and derive or do not, as `allowed` says."""
    hooks = outer_hooks()
    ours = getattr(hooks[0], "__self__", None) if hooks else None
    return isinstance(ours, Deriving) and ours.allowed == allowed
