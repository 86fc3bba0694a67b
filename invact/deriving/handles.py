"""What is kept in the stead of a tensor, and how backward gets the tensor back.

A handle is all that autograd holds. It refers to other handles and to no node of the graph, so it lives and goes with
those that need it: freed with its part of the graph, and used again when a graph is run again.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from invact import functional
from invact.kernels.masks import packed, unpacked
from invact.pytorch.backward import current_backward, engine_call, keeps_graph, node_name, when_backward_ends
from invact.pytorch.circumstances import autocast_anywhere
from invact.pytorch.devices import accelerator_type, current_stream
from invact.pytorch.saved_tensor_hooks import nodes_made, shows_what_is_kept

MOST_STEPS = 12
"""Operations of one recipe. The longest that pays, a dropped copy of a norm written out in steps, takes seven."""


DEEPEST = 48
"""Recipes within recipes, views included: each is a call within a call in backward."""

NOWHERE = object()
"""Where what a recipe reads is not kept inside the same hooks of others."""


class Handle:
    """What stands for one value.

    Attributes:
        version: how often the tensor had been changed in place when it was kept; with another one it is another value.
        steps: operations that make it from what is really kept, views not counted; 0 if it is kept itself.
        depth: the same, views counted, along the longest way.
        joins: whether a sum of two kept tensors is among the steps.
        may_be_read: whether recipes may read it.
        apart: a copy that recipes read in its stead: of a parameter that may not be there, or be another, by then.
        made_in_place: the version of the output, if the operator that keeps this value went on to work in place.
        outside: how somebody else's hooks outside of ours give back what is kept, or None. Handles are shared where
            this is the same: a checkpointed region that is run anew has to keep what it kept at first, whoever has kept
            the same value elsewhere. `NOWHERE` for a recipe that reads from inside several.
    """

    __slots__ = ("__dict__", "__weakref__", "outside", "version")  # what few handles have is in the dictionary
    outside: Any
    version: int
    steps = depth = 0
    joins = False
    unsure = False
    apart: Handle | None = None
    may_be_read = True
    made_in_place = -1

    def made(self) -> Tensor:
        """The value, laid out as it was."""
        raise NotImplementedError

    def own(self) -> Tensor:
        """The value for somebody who may write into it."""
        return self.made().clone()

    def is_contiguous(self) -> bool:
        """Whether that is known of the value as its operator gave it."""
        return False

    def wanted_again(self) -> None:
        """Tells that one more will ask for it."""


class Shared:
    """What several ask for in a backward pass: made once, and let go after the last of them, or when the pass ends.

    Attributes:
        users: how many ask for it in a pass that runs all of the graph.
    """

    __slots__ = ("__weakref__", "backward", "left", "stream", "tensor", "users")

    def __init__(self, users: int) -> None:
        self.users, self.left, self.stream, self.backward = users, 0, 0, -1
        self.tensor: Tensor | None = None

    def taken(self) -> Tensor | None:
        """What somebody has made before in this pass and on this stream, if he has."""
        tensor = self.tensor
        if tensor is None or self.backward != current_backward() or self.stream != current_stream(tensor):
            return None
        self.left -= 1
        if self.left <= 0:
            self.tensor = None
        return tensor

    def put(self, tensor: Tensor) -> None:
        """For those who ask after the one that it was made for."""
        self.tensor = None
        if self.users > 1 and (backward := current_backward()) >= 0:
            self.tensor, self.left, self.backward = tensor, self.users - 1, backward
            self.stream = current_stream(tensor)
            _let_go_after(backward, self)


class Kept(Handle):
    """The tensor itself, without its history: an output that its own operation keeps would be a cycle with it.

    Attributes:
        stands_for_another: it was taken from another tensor, and may lie differently.
        beside: of the same memory; others find it as long as this one lives.
        setting: what the operation that keeps it was told and autograd does not record, such as a norm's eps.
        asked: how many keep it.
        later: a recipe that waits for what it reads; `instead`, once that is there: the tensor is let go.
    """

    __slots__ = ("data",)
    asked = 1
    beside: Handle | None = None
    instead: Derived | None = None
    later: Derived | None = None
    setting: Any = None
    shared: Shared | None = None
    stands_for_another = False
    stride: tuple[int, ...] | None = None

    def __init__(self, tensor: Tensor, version: int, hooks: tuple[Any, Any] | None) -> None:
        self.version = version
        if hooks is None:
            self.data: Any = tensor
            self.outside = None
        else:  # somebody else's hooks outside of ours
            self.data, self.outside = hooks[0](tensor), hooks[1]
            if has_strides(tensor):
                self.stride = tensor.stride()
            self.shared = Shared(users=1)  # the node that keeps it

    def lies_like(self, tensor: Tensor) -> bool:
        """Whether who keeps `tensor`, which has this value, may get this."""
        if self.instead is not None or not self.stands_for_another:
            return True
        return tensor.stride() == (self.data.stride() if self.outside is None else self.stride)

    def is_contiguous(self) -> bool:
        return isinstance(self.data, Tensor) and has_strides(self.data) and self.data.is_contiguous()

    def asked_once_more(self) -> None:
        """One more node keeps it."""
        self.asked += 1
        if self.instead is not None:
            self.instead.wanted_again()
        elif self.shared is not None:
            self.shared.users += 1

    def derive(self) -> None:
        """What the recipe reads is kept now."""
        recipe = self.instead = self.later
        assert recipe is not None
        for _ in range(self.asked):
            recipe.wanted_again()
        self.data = self.later = self.shared = None

    def wanted_again(self) -> None:
        if self.instead is not None:
            self.instead.wanted_again()
        elif self.shared is not None:
            self.shared.users += 1
        elif has_strides(self.data):
            _READ[self.data.untyped_storage()._cdata] = self

    def own(self) -> Tensor:
        """The value for somebody who may write into it: a copy where a recipe reads it, or may do so."""
        tensor = self.made()
        if self.instead is not None:
            return tensor.clone()
        if tensor.requires_grad or not has_strides(tensor):  # a parameter, or what no recipe reads
            return tensor
        if self.outside is None and tensor.untyped_storage()._cdata not in _READ:
            return tensor
        return tensor.clone()

    def made(self) -> Tensor:
        if self.instead is not None:
            return self.instead.made()
        if self.outside is None:
            tensor: Tensor = self.data
            if tensor._version != self.version:
                raise changed_in_place(tensor, self.version)
            return tensor
        assert self.shared is not None
        given = self.shared.taken()
        if given is None:
            given = self.outside(self.data)  # checkpointing gives it once in a backward pass
            given = given if self.stride is None else laid_out(given, self.stride)
            self.shared.put(given)
        return given


class PackedMask(Kept):
    """The bytes that hold the bits of a mask."""

    __slots__ = ()


class Bits(Handle):
    """A bool tensor, in bits.

    Args:
        mask: dense, whatever the order of its dimensions.

    Attributes:
        bits: its bytes, in the order of its memory; who can use them as they are reads this handle.
    """

    __slots__ = ("bits", "shape", "stride")

    def __init__(self, mask: Tensor, version: int, hooks: tuple[Any, Any] | None) -> None:
        self.version = version
        self.shape, self.stride = mask.shape, mask.stride()
        flat = mask.as_strided((mask.numel(),), (1,))
        bits = packed(flat)
        self.bits = PackedMask(bits, bits._version, hooks)
        self.outside = self.bits.outside

    def wanted_again(self) -> None:
        self.bits.wanted_again()

    def fits(self, mask: Tensor) -> bool:
        """Whether this is the same mask, given that it has the same memory."""
        return mask.shape == self.shape and mask.stride() == self.stride

    def made(self) -> Tensor:
        return unpacked(self.bits.made(), self.shape.numel()).as_strided(self.shape, self.stride)


class Derived(Handle):
    """A recipe: an operator, with its settings, and the handles of what it reads.

    Attributes:
        stride: as the tensor was laid out, once somebody keeps it; None for a step on the way to another.
        unsure: whether a copy on the way may have been laid out otherwise than it will be.
        keeps_order: whether it is contiguous if what it reads is, as of views only some are.
        wanted: whether somebody asks for it.
        shared: where more than one do.
    """

    __slots__ = (
        "depth",
        "joins",
        "keeps_order",
        "make",
        "moves",
        "shared",
        "sources",
        "steps",
        "stride",
        "unsure",
        "wanted",
    )

    def __init__(self, make: Callable[..., Tensor], sources: tuple[Handle, ...], joins: bool, moves: bool) -> None:
        self.make, self.sources, self.moves = make, sources, moves
        self.version = 0
        self.wanted, self.keeps_order = False, True
        self.shared: Shared | None = None
        self.stride: tuple[int, ...] | None = None
        outside, steps, depth, unsure = sources[0].outside, int(moves), 0, False
        for source in sources:
            joins = joins or source.joins
            unsure = unsure or source.unsure
            steps += source.steps
            depth = max(depth, source.depth)
            if source.outside is not outside:
                outside = NOWHERE
        self.joins, self.steps, self.depth, self.unsure, self.outside = joins, steps, depth + 1, unsure, outside

    def is_contiguous(self) -> bool:
        return self.keeps_order and not self.unsure and all(source.is_contiguous() for source in self.sources)

    def awaited(self) -> list[Awaited]:
        """What is not there yet of all that it reads."""
        found: list[Awaited] = []
        for source in self.sources:
            if isinstance(source, Awaited):
                found.append(source)
            elif isinstance(source, Derived):
                found += source.awaited()
        return found

    def wanted_again(self) -> None:
        first, self.wanted = not self.wanted, True
        if self.moves and not first:
            if self.shared is None:
                self.shared = Shared(users=1)
            self.shared.users += 1
            return
        for source in self.sources:
            source.wanted_again()

    def made(self) -> Tensor:
        if self.shared is not None and (tensor := self.shared.taken()) is not None:
            return tensor
        return self.finished(self.make(*[source.made() for source in self.sources]))

    def finished(self, tensor: Tensor) -> Tensor:
        """What was made, laid out as it was, and there for the others who ask for it."""
        if self.stride is not None:
            tensor = laid_out(tensor, self.stride)
        if self.shared is not None:
            self.shared.put(tensor)
        return tensor


class LogProbabilities(Derived):
    """Those of a loss, as large as nothing else: what they are made of goes with the last who asks for them.

    At the turn from forward to backward the logits in 16 bits would lie beside their log-probabilities, the gradient
    that comes in and the one that goes out, which stock keeps without the first.

    Attributes:
        askers: nodes and recipes that ask for it.
        done: nodes that have asked and are about to be freed.
    """

    __slots__ = ("askers", "done")

    def __init__(self, make: Callable[..., Tensor], logits: Handle) -> None:
        super().__init__(make, (logits,), joins=False, moves=True)
        self.askers = self.done = 0

    def wanted_again(self) -> None:
        self.askers += 1
        super().wanted_again()

    def given_to_a_node(self) -> None:
        """To one of PyTorch's own, which asks once each time it runs."""
        if not keeps_graph():
            self.done += 1
            if self.done == self.askers:
                self.sources = ()


class Awaited(Handle):
    """What a recipe reads and nobody keeps, yet.

    Attributes:
        count: its elements.
        kept: the tensor that is kept until then.
    """

    __slots__ = ("count", "kept", "target")

    def __init__(self, outside: Any, count: int) -> None:
        self.version, self.outside, self.count = 0, outside, count
        self.kept: weakref.ref[Kept] | None = None
        self.target: Handle | None = None

    def filled(self, handle: Handle) -> None:
        """Somebody keeps it."""
        fits = not handle.version and handle.may_be_read and not handle.joins and handle.outside is self.outside
        fits = fits and not handle.unsure
        kept = self.kept() if self.kept is not None and self.target is None else None
        if not fits or kept is None or kept.later is None or handle is kept:
            return
        if handle.steps + kept.later.steps > MOST_STEPS or handle.depth + kept.later.depth > DEEPEST:
            return
        self.target = handle
        if all(other.target is not None for other in kept.later.awaited()):
            kept.derive()

    def wanted_again(self) -> None:
        assert self.target is not None
        self.target.wanted_again()

    def made(self) -> Tensor:
        assert self.target is not None
        return self.target.made()


def has_strides(tensor: Tensor) -> bool:
    """Whether it is one block of memory: neither sparse nor nested."""
    return tensor.layout is torch.strided and not tensor.is_nested


def laid_out(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor with other strides: matrix products in backward round differently when they read it differently."""
    if tensor.stride() == stride:
        return tensor
    made = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    once = tuple(slice(None) if step else slice(1) for step in stride)  # of what is expanded
    made[once].copy_(tensor[once])
    return made


def remade(handle: Handle) -> Tensor:
    """What is asked for in backward, worked out as it was in forward: after all casts, and recording nothing.

    A function written in Python may write into what it has kept, by kernels that autograd knows nothing of, as those of
    Unsloth and Liger do; it gets a tensor of its own.
    """
    try:
        caller = sys._getframe(1)
    except ValueError:  # the engine runs in a thread of its own
        caller = None
    if not shows_what_is_kept and caller is not None and caller.f_code is asked.__code__:
        caller.f_locals["given"].append(handle)
        return torch.empty(0)  # a new one each time: under fake tensors one that is shared is freed too often
    to_read = caller is None or caller.f_code is _ENGINE or caller.f_globals is _OURS
    if type(handle) is Kept and handle.instead is None:
        if to_read and handle.outside is None and handle.data._version == handle.version:
            tensor: Tensor = handle.data  # as `made` gives it; most are these, and a call counts
            return tensor
        return handle.made() if to_read else handle.own()
    if torch.is_grad_enabled() or autocast_anywhere():
        with _as_recorded():
            tensor = handle.made() if to_read else handle.own()
    else:
        tensor = handle.made() if to_read else handle.own()
    if type(handle) is LogProbabilities and to_read:
        handle.given_to_a_node()
    return tensor


_ENGINE = engine_call.__code__
NOT_KNOWN = object()


def kept_by(node: Any, name: str) -> Any:
    """What a node keeps under a name of `derivatives.yaml`: the handle; a number, as a tensor; None for nothing.

    `NOT_KNOWN` where it has no such name, has been run and let it go, or has not come to keep it.
    """
    if not shows_what_is_kept:
        return asked(node, name)
    raw = getattr(node, "_raw_saved_" + name, None)
    try:
        return NOT_KNOWN if raw is None else raw.data
    except RuntimeError:
        return NOT_KNOWN


def asked(node: Any, name: str) -> Any:
    """The same by way of our unpacking hook, which finds `given` in its caller's frame.

    Asked of nodes that kept something with our hooks alone: those of a checkpointed region would run it anew.
    """
    if node._sequence_nr() not in _keeping_here():
        return NOT_KNOWN
    given: list[Handle] = []
    try:
        tensor = getattr(node, "_saved_" + name, NOT_KNOWN)
    except RuntimeError:
        return NOT_KNOWN
    return given[0] if given else tensor


def kept_something(tensor: Tensor) -> None:
    """Notes, in the midst of a hook, which node is keeping a tensor: the last one that was made in this thread, or the
    one before it, if the last has just made a copy for it, as of what is about to be changed in place."""
    keeping, last = _keeping_here(), nodes_made() - 1
    keeping[last] = None
    node = tensor.grad_fn
    if node is not None and node_name(node) == "CloneBackward0" and node._sequence_nr() == last:
        keeping[last - 1] = None
    if len(keeping) > _MOST_NOTED:
        for oldest in list(itertools.islice(keeping, _MOST_NOTED // 2)):
            del keeping[oldest]


def _keeping_here() -> dict[int, None]:
    """The numbers of the nodes that kept something with our hooks, the oldest first; each thread counts its own."""
    try:
        return _THREAD.keeping  # type: ignore[no-any-return]
    except AttributeError:
        keeping: dict[int, None] = {}
        _THREAD.keeping = keeping
        return keeping


_MOST_NOTED = 1 << 20
_THREAD = threading.local()
_OURS = functional.__dict__


@contextmanager
def _as_recorded() -> Iterator[None]:
    devices = [device for device in ("cpu", accelerator_type()) if torch.is_autocast_enabled(device)]
    with torch.no_grad(), ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def changed_in_place(tensor: Tensor, expected: int) -> RuntimeError:
    """What stock PyTorch says there; with hooks in place it no longer looks."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {expected} instead. "
        "It is kept for backward, or another tensor is made again from it. Change a copy of it, or change it after "
        "backward."
    )


# By the identity of its storage, a kept tensor that recipes read.
_READ: weakref.WeakValueDictionary[int, Kept] = weakref.WeakValueDictionary()


# --- what is shared within a backward pass -------------------------------------------------------------

# By the number of the backward pass: what is held there for whoever asks next. One that breaks off leaves it in its
# graph, where no other pass takes it, until the next one that asks.
_SHARED: dict[int, list[weakref.ref[Shared]]] = {}


def _let_go_after(backward: int, shared: Shared) -> None:
    """Some may never ask, where not all of the graph is run."""
    held = _SHARED.get(backward)
    if held is None:
        held = _SHARED[backward] = []
        when_backward_ends(lambda: _let_go(backward))
    held.append(weakref.ref(shared))


def _let_go(backward: int) -> None:
    for reference in _SHARED.pop(backward, ()):
        shared = reference()
        if shared is not None and shared.backward == backward:
            shared.tensor = None
