"""What is kept in the stead of a tensor, and how backward gets the tensor back.

A handle is all that autograd holds. It refers to other handles and to no node of the graph, so it lives and goes with
those that need it: freed with its part of the graph, and used again when a graph is run again.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from invact import functional
from invact.kernels.packing import packed, unpacked
from invact.pytorch_inside import (
    accelerator_type,
    autocast_anywhere,
    current_backward,
    current_stream,
    engine_call,
    when_backward_ends,
)


class Handle:
    """What stands for one value.

    Attributes:
        version: how often the tensor had been changed in place when it was kept; with another one it is another value.
        steps: operations that make it from what is really kept; 0 if it is kept itself.
        joins: whether a sum of two kept tensors is among the steps.
        made_in_place: the version of the output, if the operator that keeps this value went on to work in place.
    """

    __slots__ = ("__weakref__", "made_in_place", "version")
    steps = 0
    joins = False

    def made(self) -> Tensor:
        """The value, laid out as it was."""
        raise NotImplementedError

    def own(self) -> Tensor:
        """The value for somebody who may write into it."""
        return self.made().clone()

    def wanted_again(self) -> None:
        """Tells that one more will ask for it."""


class Kept(Handle):
    """The tensor itself, without its history: an output that its own operation keeps would be a cycle with it.

    Attributes:
        source: whether recipes may read it.
        narrow: whether this is a 16-bit copy, kept in the stead of a wide one.
        apart: a copy, which recipes read in its stead: of a parameter that may not be there, or another, by then.
        setting: what the operation that keeps it was told and autograd does not record, such as a norm's eps.
    """

    __slots__ = ("apart", "data", "given_back", "held", "left", "narrow", "setting", "source", "stride", "users")

    def __init__(self, tensor: Tensor, version: int, hooks: tuple[Any, Any] | None) -> None:
        self.version = version
        self.source, self.narrow = True, False
        self.apart: Kept | None = None
        self.setting: Any = None
        self.made_in_place = -1
        self.users, self.left = 1, 0
        self.held: tuple[int, Tensor] | None = None
        if hooks is None:
            self.data: Any = tensor
            self.given_back = None
        else:  # somebody else's hooks outside of ours
            self.data, self.given_back = hooks[0](tensor), hooks[1]
            self.stride = tensor.stride() if tensor.layout is torch.strided else None

    def wanted_again(self) -> None:
        self.users += 1
        if self.given_back is None:
            _READ[self.data.untyped_storage()._cdata] = self

    def own(self) -> Tensor:
        """The value for somebody who may write into it: a copy where a recipe reads it, or may do so."""
        tensor = self.made()
        if self.given_back is None and tensor.untyped_storage()._cdata not in _READ:
            return tensor
        return tensor if tensor.requires_grad else tensor.clone()

    def made(self) -> Tensor:
        if self.given_back is None:
            tensor: Tensor = self.data
            if tensor._version != self.version:
                raise changed_in_place(tensor, self.version)
            return tensor
        return self._made_by_others()

    def _made_by_others(self) -> Tensor:
        """Asked for once in a backward pass, whoever wants it: a checkpointed region gives what it kept only once."""
        backward = current_backward()
        if self.held is not None and self.held[0] == backward:
            tensor = self.held[1]
            self.left -= 1
            if self.left <= 0:
                self.held = None
            return tensor
        tensor = self.given_back(self.data)
        if self.stride is not None:
            tensor = laid_out(tensor, self.stride)
        if self.users > 1 and backward >= 0:
            self.held, self.left = (backward, tensor), self.users - 1
            _let_go_after(backward, self)
        return tensor


class Bits(Handle):
    """A bool tensor, in bits.

    Args:
        mask: dense, whatever the order of its dimensions.
    """

    __slots__ = ("bits", "shape", "stride")

    def __init__(self, mask: Tensor, version: int, hooks: tuple[Any, Any] | None) -> None:
        self.version = version
        self.shape, self.stride = mask.shape, mask.stride()
        flat = mask.as_strided((mask.numel(),), (1,))
        bits = packed(flat)
        self.bits = Kept(bits, bits._version, hooks)

    def fits(self, mask: Tensor) -> bool:
        """Whether this is the same mask, given that it has the same memory."""
        return mask.shape == self.shape and mask.stride() == self.stride

    def made(self) -> Tensor:
        return unpacked(self.bits.made(), self.shape.numel()).as_strided(self.shape, self.stride)


class Derived(Handle):
    """A recipe: an operator, with its settings, and the handles of what it reads.

    What several ask for is made once and let go after the last of them, or when backward ends.

    Attributes:
        stride: as the tensor was laid out, once somebody keeps it; None for a step on the way to another.
        nbytes: of the tensor; 0 where nobody writes that down.
    """

    __slots__ = ("cache", "joins", "left", "make", "moves", "nbytes", "sources", "steps", "stream", "stride", "users")

    def __init__(self, make: Callable[..., Tensor], sources: tuple[Handle, ...], joins: bool, moves: bool) -> None:
        self.make, self.sources, self.moves = make, sources, moves
        self.version, self.users, self.left, self.stream, self.nbytes = 0, 0, 0, 0, 0
        self.made_in_place = -1
        self.cache: Tensor | None = None
        self.stride: tuple[int, ...] | None = None
        self.joins, self.steps = joins, int(moves)
        for source in sources:
            self.joins = self.joins or source.joins
            self.steps += source.steps

    def wanted_again(self) -> None:
        self.users += 1
        if self.users == 1 or not self.moves:
            for source in self.sources:
                source.wanted_again()

    def made(self) -> Tensor:
        tensor = self.cache
        if tensor is not None and self.stream == current_stream(tensor):
            self.left -= 1
            if self.left <= 0:
                self.cache = None
            return tensor
        tensor = self.make(*[source.made() for source in self.sources])
        if self.stride is not None and tensor.stride() != self.stride:
            tensor = laid_out(tensor, self.stride)
        if self.users > 1 and self.moves and (backward := current_backward()) >= 0:
            self.cache, self.left, self.stream = tensor, self.users - 1, current_stream(tensor)
            _let_go_after(backward, self)
        return tensor


def laid_out(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor with other strides: matrix products in backward round differently when they read it differently."""
    if tensor.stride() == stride:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def remade(handle: Handle) -> Tensor:
    """What is asked for in backward, worked out as it was in forward: after all casts, and recording nothing.

    A function written in Python may write into what it has kept, by kernels that autograd knows nothing of, as those of
    Unsloth and Liger do; it gets a tensor of its own.
    """
    caller = sys._getframe().f_back  # none where the engine runs in a thread of its own
    give = handle.made if caller is None or caller.f_code is _ENGINE or _is_ours(caller) else handle.own
    if type(handle) is not Kept and (torch.is_grad_enabled() or autocast_anywhere()):
        with _as_recorded():
            return give()
    return give()


_ENGINE = engine_call.__code__


def _is_ours(caller: types.FrameType) -> bool:
    return caller.f_globals is functional.__dict__


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

# By the number of the backward pass: what is held there for whoever asks next. One that breaks off leaves weak
# references behind and no tensor, since its graph is let go.
_SHARED: dict[int, list[weakref.ref[Derived] | weakref.ref[Kept]]] = {}


def _let_go_after(backward: int, handle: Derived | Kept) -> None:
    """Some may never ask, where not all of the graph is run."""
    shared = _SHARED.get(backward)
    if shared is None:
        shared = _SHARED[backward] = []
        when_backward_ends(lambda: _let_go(backward))
    shared.append(weakref.ref(handle))


def _let_go(backward: int) -> None:
    for reference in _SHARED.pop(backward, ()):
        handle = reference()
        if isinstance(handle, Derived):
            handle.cache = None
        elif handle is not None:
            handle.held = None
