"""What is kept in the stead of a tensor, and how backward gets the tensor back.

A handle is all that autograd holds. It refers to other handles and to no node of the graph, so it lives and goes with
those that need it: freed with its part of the graph, and used again when a graph is run again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from invact.deriving.backward_cache import Shared
from invact.deriving.layouts import has_strides, laid_out

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
        unsure: whether it is not known that a copy among the steps lay as the one that is made again does.
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


# By the identity of its storage, a kept tensor that recipes read.
_READ: weakref.WeakValueDictionary[int, Kept] = weakref.WeakValueDictionary()


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


def changed_in_place(tensor: Tensor, expected: int) -> RuntimeError:
    """What stock PyTorch says there; with hooks in place it no longer looks."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {expected} instead. "
        "It is kept for backward, or another tensor is made again from it. Change a copy of it, or change it after "
        "backward."
    )
