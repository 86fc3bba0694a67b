"""Looks at each tensor that autograd is about to keep, and keeps a recipe in its stead where there is one.

The hooks hold nothing. Which handle stands for which value is noted, weakly, with the node that made the value, so that
whoever keeps the same value later finds it, in this forward pass or another, and nothing outlives the graph.
"""

from __future__ import annotations

import itertools
import math
import sys
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from invact.deriving.asking import kept_by, kept_something
from invact.deriving.handles import DEEPEST, MOST_STEPS, Awaited, Derived, Handle, Kept
from invact.deriving.journal import journal_here
from invact.deriving.layouts import has_strides
from invact.deriving.masks import Bits
from invact.deriving.parameters import copied, is_parameter, parameters_may_go
from invact.deriving.rules.padding import FILLED
from invact.deriving.rules.registry import ON_THE_WAY, RULES, SUMS, VIEWS
from invact.deriving.stead import stead_of
from invact.deriving.unpacking import remade
from invact.pytorch.inside import (
    FakeTensor,
    StorageWeakRef,
    hooks_allowed,
    node_name,
    outer_hooks,
    shows_what_is_kept,
    transforms_active,
)

SMALLEST = 1024
"""Elements from which on a tensor is derived: one of fewer bytes than a handful of handles is not worth its recipe."""

MOST_SEARCHED = 64
"""Operators that are looked at for one tensor: the longest recipe that pays has a quarter of them, views included."""

_PLAIN = (Tensor, FakeTensor)


class NormSettings(NamedTuple):
    """What a norm was told and its node does not know.

    Attributes:
        running: the mean and variance that run along; nobody counts their changes.
        images: how often they stand side by side in an instance norm, which is a batch norm of the channels of each.
    """

    eps: float | None
    bias: Kept | None = None
    running: tuple[Tensor, Tensor] | None = None
    images: int = 1


# What their nodes do not know. A layer norm's keeps the bias, an RMS norm has none.
_NORMS = {
    F.layer_norm.__code__: "eps",
    F.rms_norm.__code__: "eps",
    F.group_norm.__code__: "eps and bias",
    F.batch_norm.__code__: "eps and bias",
    F.instance_norm.__code__: "eps and bias",
}
_DROPOUT = F.dropout.__code__
_STATISTICS_WITH_HISTORY = ("NativeGroupNormBackward0", "FusedRmsNormBackward0")
# Functions that may work in place, and then keep a copy of what they were given.
_IN_PLACE = {
    getattr(F, name).__code__
    for name in ("silu", "hardswish", "mish", "elu", "selu", "celu", "leaky_relu", "hardtanh", "relu6", "hardsigmoid")
}
_KEEP_THEIR_RESULT = {
    *("ReluBackward0", "SigmoidBackward0", "TanhBackward0", "ExpBackward0", "Expm1Backward0", "SqrtBackward0"),
    *("RsqrtBackward0", "ReciprocalBackward0", "LeakyReluBackward1", "EluBackward1", "CeluBackward1"),
}

# Nodes that do not know all the settings; see `NormSettings`.
_TOLD_IN_THEIR_CALL = {
    "NativeLayerNormBackward0",
    "FusedRmsNormBackward0",
    "NativeGroupNormBackward0",
    "NativeBatchNormBackward0",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
}

# Under these, with its number, stands what is known of a node's output, in the dictionary that autograd has for such
# notes: its handle; what waits for it; that no recipe was found, and by which hooks.
_FOUND, _AWAITED, _NOT_FOUND = "invact found", "invact awaited", "invact not found"

_COPIES = ("CloneBackward0", "ToCopyBackward0", "CatBackward0")
_EXACT = {*VIEWS, "AddBackward0", "DivBackward0", "MulBackward0", "NegBackward0", "SubBackward0"}
_OF_TWO = ("AddBackward0", "SubBackward0")
_PARTS = {
    *("SelectBackward0", "SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0", "UnbindBackward0"),
    *("UnsafeSplitBackward0", "UnsafeSplitWithSizesBackward0"),
}
# Made of one operand, if at all; what else they read they keep themselves.
_OF_ONE = {*VIEWS, "CloneBackward0", "NativeDropoutBackward0", "ToCopyBackward0"}
_LEAF = "torch::autograd::AccumulateGrad"


class Deriving:
    """Derives what can be derived of what autograd keeps inside it.

    Args:
        allowed: False keeps everything as it is, in the midst of a part where this is derived.
        module: runs inside; what lies in its buffers and parameters is there anyway.

    Example:
        >>> norm, linear = torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)
        >>> x = torch.randn(32, 64, requires_grad=True)
        >>> with Deriving():
        ...     y = linear(norm(x))
        >>> type(kept_by(y.grad_fn, "mat1")).__name__  # the norm's output, which the linear layer wants
        'Derived'
    """

    def __init__(self, allowed: bool = True, module: nn.Module | None = None) -> None:
        self.allowed, self.journal = allowed, journal_here()
        self._module = None if module is None else weakref.ref(module)  # which may hold a graph, as the graph does us
        self._weights: set[int] | None = None
        self.outer = outer_hooks()
        self.outside = None if self.outer is None else self.outer[1]
        self.parameters_may_go = parameters_may_go()
        self._token = object()  # for notes with nodes, which must hold nothing
        self._left = 0  # of the operators that may still be looked at for a tensor
        self._parts_wait = False  # whether something waits for a tensor of which it reads a part
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
        elif tensor.numel() < SMALLEST or (name := node_name(node)) == "TBackward0" or not _is_plain(tensor):
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

    def _kept(self, tensor: Tensor) -> Kept:
        """An output without its history; what has none is kept itself: without a gradient it comes back as it is."""
        kept = Kept(tensor if tensor.grad_fn is None else tensor.detach(), tensor._version, self.outer)
        if self.parameters_may_go and is_parameter(tensor):
            copy = copied(tensor)
            kept.may_be_read = copy is not None
            kept.apart = None if copy is None else Kept(copy, copy._version, self.outer)
        return kept

    def _constant(self, tensor: Tensor, frame: Any) -> Handle:
        """Of what has neither history nor gradient, such as masks and the statistics of norms."""
        if tensor.dtype is torch.bool and tensor.numel() >= SMALLEST and _is_plain(tensor):
            dropped = frame.f_code is _DROPOUT  # by a mask that is nobody else's
            bits = None if not dropped and self._is_weight(tensor) else self._bits(tensor, shared=not dropped)
            if bits is not None:
                return bits
        handle = Kept(tensor, tensor._version, self.outer)
        told = _NORMS.get(frame.f_code)
        if told is not None:
            handle.setting = self._norm_settings(frame, told)
        return handle

    def _norm_settings(self, frame: Any, told: str) -> NormSettings:
        local = frame.f_locals
        if told == "eps":
            return NormSettings(local["eps"])
        bias, mean, var = local["bias"], local.get("running_mean"), local.get("running_var")
        images = local["input"].shape[0] if frame.f_code is F.instance_norm.__code__ else 1
        bias = bias if bias is None or images == 1 else bias.repeat(images)
        running = None if mean is None or var is None else (mean, var)
        return NormSettings(local["eps"], None if bias is None else self._kept(bias), running, images)

    def _tell_of_norm(self, handle: Handle, node: Any, frame: Any) -> None:
        """Its statistics have a history, as those of the fused RMS norm have, and no other norm's."""
        told = _NORMS.get(frame.f_code)
        if told is not None and isinstance(handle, Kept) and node_name(node) in _STATISTICS_WITH_HISTORY:
            handle.setting = self._norm_settings(frame, told)

    def _with_history(self, tensor: Tensor, node: Any, name: str, frame: Any) -> Handle:
        number, version = tensor.output_nr, tensor._version
        metadata = node.metadata
        known = self._noted(metadata, (_FOUND, number))
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

    def _part_of_what_is_awaited(self, view: Tensor, node: Any, number: int) -> Handle | None:
        """Keeps all of a tensor of which a part is kept, if something waits for it, and the part as a view of that.

        It takes no more memory: a view keeps all of it anyway.
        """
        whole = view._base
        if whole is None or whole.grad_fn is None or not _is_plain(whole):
            return None
        if whole._version or whole.numel() <= view.numel():
            return None
        base: Any = whole.grad_fn
        between: list[tuple[Any, int]] = []
        above, output = node, number
        while above is not base and above is not None and node_name(above) in VIEWS:
            between.append((above, output))
            above, output = above.next_functions[0]
        awaited = [(above, output) for above, output in between if _is_awaited(above, output)]
        if above is not base or not (awaited or _is_awaited(base, whole.output_nr)):
            return None
        kept = self._kept(whole)
        self._note(base.metadata, whole.output_nr, kept)
        self._token, self._left = object(), MOST_SEARCHED  # what was not found before may be now
        for above, output in awaited:
            if (handle := self._find(above, output)) is not None:
                self._note(above.metadata, output, handle)
        part = self._find(node, number)
        if not isinstance(part, Derived):  # a view without a rule
            same = self._kept(view)
            same.beside = kept
            return same
        part.stride = view.stride()
        part.wanted_again()
        return part

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

    def _note(self, metadata: dict[Any, Any], number: int, handle: Handle) -> None:
        metadata[_FOUND, number] = weakref.ref(handle)
        for waiting in metadata.pop((_AWAITED, number), ()):
            awaited = waiting()
            if awaited is not None:
                awaited.filled(handle)

    def _worked_in_place(self, node: Any, name: str, version: int) -> bool:
        """Whether this is the output of an operator that works in place, and not changed since."""
        if name in _KEEP_THEIR_RESULT:
            return not isinstance(kept_by(node, "result"), Handle)  # it is about to keep it, and has just made it
        kept = kept_by(node, "self")
        return isinstance(kept, Kept | Derived) and kept.made_in_place == version

    def _derived(self, tensor: Tensor, node: Any, number: int, version: int, frame: Any) -> Handle | None:
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

    def _is_surely_not_at_hand(self, node: Any, number: int) -> bool:
        """Of an operand of a sum, most of which are residual sums: what a matrix product or another sum gave, or what
        one operand alone was made of that. Told in a few steps, where a search would take long to fail."""
        while node is not None:
            if self._noted(node.metadata, (_FOUND, number)) is not None:
                return False
            name = node_name(node)
            if name not in _OF_ONE and not (name == "MulBackward0" and kept_by(node, "self") is None):
                return name in SUMS or (name not in RULES and name != _LEAF)
            node, number = node.next_functions[0]
        return True

    @staticmethod
    def _laid_out_alike(handle: Handle, tensor: Tensor, name: str) -> bool:
        """Whether copies on the way to a tensor, which the node of this name gave, will lie as they lay.

        A copy that is kept, or a view of it, tells how it lies; and what is made element by element of one that is not
        contiguous is not contiguous either.
        """
        base = tensor if tensor._base is None else tensor._base
        if name not in _COPIES and (base.grad_fn is None or node_name(base.grad_fn) not in _COPIES):
            return base.is_contiguous()
        views = []
        while isinstance(handle, Derived) and not handle.moves:
            views.append(handle)
            handle = handle.sources[0]
        if not isinstance(handle, Derived) or any(source.unsure for source in handle.sources):
            return False
        handle.stride = base.stride()
        for told in (handle, *views):
            told.unsure = False
        return True

    def _find(self, node: Any, number: int) -> Handle | None:
        """The handle of an output: noted, a leaf, or by a recipe of its own."""
        metadata = node.metadata
        known = self._noted(metadata, (_FOUND, number))
        if known is not None:
            return (known.apart or known) if known.may_be_read else None
        name = node_name(node)
        if name == _LEAF:
            return self._leaf(node.variable)
        rule = RULES.get(name)
        if rule is None or not self._left or metadata.get((_NOT_FOUND, number)) is self._token:
            return None
        self._left -= 1
        handle = rule(node, number, self._find)
        if handle is None or not self._can_be_run(handle):
            if self._left:  # else there may be one, had it been looked for further
                metadata[_NOT_FOUND, number] = self._token
            return None
        if self.journal is not None:
            self.journal.recipe(handle, node, number)
        metadata[_FOUND, number] = weakref.ref(handle)
        return handle

    def _leaf(self, leaf: Tensor) -> Kept | None:
        """What its operator has not kept: nothing tells what it held then, unless it never held anything else.

        Parameters are stepped between one forward pass and the next, and are not read.
        """
        return None if leaf._version or is_parameter(leaf) else self._kept(leaf)

    def _can_be_run(self, recipe: Derived) -> bool:
        """Whether it is short enough, and all that it reads is kept inside the same hooks of others as this here."""
        return recipe.steps <= MOST_STEPS and recipe.depth <= DEEPEST and recipe.outside is self.outside

    def _noted(self, metadata: dict[Any, Any], key: tuple[str, int]) -> Handle | None:
        reference = metadata.get(key)
        known: Handle | None = None if reference is None else reference()
        return known if known is not None and known.outside is self.outside else None

    def _later(self, tensor: Tensor, node: Any, number: int) -> Kept | None:
        """Keeps a tensor until somebody keeps what it can be made of, as `x * sigmoid(x)` does, the sigmoid first."""
        name = node_name(node)
        if name in SUMS and not _turns_a_part(node):  # most are residual sums, of which nothing would come
            return None
        self._left = MOST_SEARCHED
        recipe = RULES[name](node, number, self._find_or_await)
        if recipe is None or not recipe.steps or not self._can_be_run(recipe):
            return None
        if recipe.unsure and not (_is_exact_down_to_copies(node) or self._laid_out_alike(recipe, tensor, name)):
            return None
        waiting = recipe.awaited()
        if recipe.joins and any(awaited.count <= tensor.numel() for awaited in waiting):
            return None  # but of parts of what is kept whole, as rotated keys are of one projection
        self._parts_wait = self._parts_wait or any(awaited.count > tensor.numel() for awaited in waiting)
        kept = self._kept(tensor)
        recipe.stride = tensor.stride()
        kept.later = recipe
        if self.journal is not None:
            self.journal.recipe(recipe, node, number)
        for awaited in waiting:
            awaited.kept = weakref.ref(kept)
        return kept

    def _find_or_await(self, node: Any, number: int) -> Handle | None:
        """`_find`, or in its stead what waits until the output is kept."""
        found = self._find(node, number)
        if found is not None:
            return found
        name = node_name(node)
        rule = RULES.get(name)
        summed = name in SUMS
        if name == _LEAF or (summed and not _turns_a_part(node)):
            return None  # a note at a leaf would stay
        count = math.prod(node._input_metadata[number].shape)
        if rule is not None and self._left:
            self._left -= 1
            handle = rule(node, number, self._find_or_await)
            waiting = handle.awaited() if handle is not None and not handle.steps else []
            of_a_part = any(awaited.count > count for awaited in waiting)  # who keeps a part keeps all of its memory
            if summed or of_a_part or not waiting:  # else a view, which may itself be kept
                if handle is not None and self.journal is not None:
                    self.journal.recipe(handle, node, number)
                return handle
        if summed:
            return None  # it may have been added up in place, as linear layers do
        awaited = Awaited(self.outside, count)
        node.metadata.setdefault((_AWAITED, number), []).append(weakref.ref(awaited))
        return awaited

    def _why_kept(self, tensor: Tensor) -> str:
        """For the plan, of a tensor that is kept."""
        node = tensor.grad_fn
        if tensor.numel() < SMALLEST:
            return f"of fewer than {SMALLEST} elements"
        if node is None:
            return "without a gradient there is no graph that tells how it was made"
        if not _is_plain(tensor):
            kind = f"a {type(tensor).__name__}" if type(tensor) not in _PLAIN else "sparse or nested"
            return f"{kind}, which has rules of its own"
        if node_name(node) not in RULES:
            return "there is no recipe for that operator"
        if tensor._version and not self._worked_in_place(node, node_name(node), tensor._version):
            return "changed in place"
        self._left = MOST_SEARCHED
        recipe = RULES[node_name(node)](node, tensor.output_nr, self._find)
        if recipe is not None:
            return f"its recipe would take more than {MOST_STEPS} steps" if recipe.steps > MOST_STEPS else ""
        if node_name(node) in _TOLD_IN_THEIR_CALL:
            return "it takes numbers that autograd does not record"
        if node_name(node) in SUMS:
            return "it would be added up from another sum that is not kept, and so on"
        return "what it would be made again from is not kept either"

    def _bits(self, mask: Tensor, shared: bool) -> Handle | None:
        """Of a dense mask; where it may be `shared`, one for all who keep it."""
        dense = mask.is_contiguous() or mask.is_contiguous(memory_format=torch.channels_last)
        if not dense or mask.untyped_storage().nbytes() != mask.numel():
            return None
        if not shared:
            return Bits(mask, mask._version, self.outer)
        storage = StorageWeakRef(mask.untyped_storage())
        key = storage.cdata
        known = _MASKS.get(key)
        if known is not None:
            handle = known[1]()
            same = handle is not None and not known[0].expired() and handle.outside is self.outside
            if handle is not None and same and handle.version == mask._version and handle.fits(mask):
                handle.bits.asked_once_more()
                return handle
        handle = Bits(mask, mask._version, self.outer)

        def forget(reference: weakref.ref[Bits]) -> None:
            if key in _MASKS and _MASKS[key][1] is reference:  # else another mask lies there by now
                del _MASKS[key]

        _MASKS[key] = storage, weakref.ref(handle, forget)
        return handle

    def _is_weight(self, mask: Tensor) -> bool:
        """Whether it lies in a buffer or parameter, which is there anyway."""
        if self._weights is None:
            module = None if self._module is None else self._module()
            weights = () if module is None else itertools.chain(module.buffers(), module.parameters())
            self._weights = {each.untyped_storage()._cdata for each in weights if _is_plain(each)}
        return mask.untyped_storage()._cdata in self._weights


# By the identity of its storage, the bits of a mask that several keep; it has no node on which to note them.
_MASKS: dict[int, tuple[StorageWeakRef, weakref.ref[Bits]]] = {}


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN and has_strides(tensor)


def _made_by_a_rule(node: Any, name: str) -> bool:
    """Whether there is a rule for what made the tensor that this is a view of: for most that are kept there is none."""
    while name in VIEWS:
        node = node.next_functions[0][0]
        if node is None:
            return False
        name = node_name(node)
    return name in RULES and name not in ON_THE_WAY


def _is_exact_down_to_copies(node: Any) -> bool:
    """Whether all that was done to copies since is right to the last digit however they lay."""
    left, nodes = MOST_SEARCHED, [node]
    while nodes and left:
        left, node = left - 1, nodes.pop()
        name = None if node is None else node_name(node)
        if name in _EXACT:
            nodes += [producer for producer, _ in node.next_functions]
        elif name in RULES and name not in _COPIES:
            return False
    return not nodes


def _finds_wide(narrow: Kept, dtype: torch.dtype) -> Any:
    """Finds, whatever a rule for an operator of one tensor looks for, this in another type."""
    wide = Derived(lambda x: x.to(dtype), (narrow,), joins=False, moves=True)
    return lambda producer, number: wide


def _is_awaited(node: Any, number: int) -> bool:
    return any(waiting() is not None for waiting in node.metadata.get((_AWAITED, number), ()))


def _turns_a_part(node: Any) -> bool:
    """Whether a sum is as of the queries and keys of one projection: `x * cos + y * sin`, of a part x of a tensor."""
    if not all(summand is not None and node_name(summand) == "MulBackward0" for summand, _ in node.next_functions[:2]):
        return False
    while node is not None:
        name = node_name(node)
        if name in _PARTS or not (name in SUMS or name in _OF_ONE or name == "MulBackward0"):
            return name in _PARTS
        node = node.next_functions[0][0]
    return False


def may_derive() -> bool:
    """Whether hooks can be set where this is called: not while a graph is traced, nor inside torch.func."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return hooks_allowed() and not transforms_active() and not torch.jit.is_tracing()  # type: ignore[attr-defined]


def is_deriving(allowed: bool) -> bool:
    """Whether the innermost hooks are ours."""
    hooks = outer_hooks()
    ours = getattr(hooks[0], "__self__", None) if hooks else None
    return isinstance(ours, Deriving) and ours.allowed == allowed
