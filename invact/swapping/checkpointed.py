"""The class of a block that is checkpointed: its forward runs once more in backward, and keeps no more than inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from invact.errors.own_errors import users_call
from invact.pytorch.circumstances import transforms_active
from invact.pytorch.containers import tree_leaves
from invact.swapping.class_over import class_over, shared_class, sites_below
from invact.swapping.patched import Patched, is_patched
from invact.swapping.transformers_layer import has_own_switch


def checkpointed_class(below: type[nn.Module], by_call: bool) -> type:
    """Of a block whose forward is run once more in backward instead of keeping what it keeps.

    Args:
        by_call: as of `deriving_class`.
    """
    if has_own_switch(below):
        return switched_class(below)
    name = "__call__" if by_call else "forward"
    return _checkpointed(below, name, lambda: {name: _checkpointed_method(below, name)})


def switched_class(below: type[nn.Module]) -> type:
    """Of a layer of transformers with its switch on, or of the model around it, which makes no cache then."""
    return _checkpointed(
        below, "", lambda: {"gradient_checkpointing": _ON, "_gradient_checkpointing_func": _CHECKPOINT}
    )


def _checkpointed(below: type[nn.Module], how: str, methods: Callable[[], Mapping[str, Any]]) -> type:
    def make() -> type:
        return class_over(below, Patched, {**methods(), "_invact_checkpoints": True}, sites_below(below))

    return shared_class(below, ("checkpoint", how), make)


class _Switch:
    """An attribute that reads as ours whatever the module's own is, which can be set all the same."""

    def __init__(self, value: Callable[[], Any]) -> None:
        self._value = value

    def __set_name__(self, kind: type, name: str) -> None:
        self._name = name  # the same in all classes

    def __get__(self, module: Any, kind: type) -> Any:
        return self._value()

    def __set__(self, module: Any, value: Any) -> None:
        module.__dict__[self._name] = value


def _may_checkpoint() -> bool:
    """Whether there is a backward for which to run a block again, and hooks on what is kept may be set."""
    return torch.is_grad_enabled() and not transforms_active()


def _checkpointed_layer(function: Any, *args: Any) -> Any:
    """What a layer of transformers has its forward run by: `function` holds the layer and its keyword arguments."""
    return _run_checkpointed(None, function, args, {}, held=getattr(function, "keywords", {}))


_ON = _Switch(_may_checkpoint)


_CHECKPOINT = _Switch(lambda: _checkpointed_layer)


def _checkpointed_method(below: type[nn.Module], name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(below, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        method_below = getattr(below, name)
        if not (_may_checkpoint() and is_patched(self)):
            return users_call(method_below, self, *args, **kwargs)
        return _run_checkpointed(self, functools.partial(method_below, self), args, kwargs, held=kwargs)

    return method


def _run_checkpointed(
    block: nn.Module | None, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], held: Mapping[str, Any]
) -> Any:
    """PyTorch's checkpointing of one call.

    Args:
        block: whose running statistics are to be counted once; None for one that has none.
        held: the keyword arguments that the forward gets, be it that `function` holds them already.
    """
    if torch.compiler.is_compiling():
        return users_call(checkpoint, function, *args, use_reentrant=False, **kwargs)
    contexts = functools.partial(_contexts, block, args, held)
    return users_call(checkpoint, function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


# Whose buffers a forward changes and no gradient depends on in training.
WITH_RUNNING_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _contexts(
    block: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Those of the first and of the second forward of a block that is checkpointed; as of `_run_checkpointed`."""
    # PyTorch looks after tensors that are arguments by position; of others it would take what they have become.
    others = [arg for arg in args if not isinstance(arg, Tensor)], kwargs
    versions = [(leaf, leaf._version) for leaf in tree_leaves(others) if isinstance(leaf, Tensor)]
    return nullcontext(), _second_forward(block, versions)


@contextmanager
def _second_forward(block: nn.Module | None, versions: list[tuple[Tensor, int]]) -> Iterator[None]:
    """In the block batch norms count into copies: the first forward has counted already.

    Raises:
        RuntimeError: an argument was changed in place since the first forward.
    """
    if any(tensor._version != version for tensor, version in versions):
        raise RuntimeError(
            "a block that invact.fit has checkpointed runs once more in backward, and one of its arguments has been "
            "changed in place since it was given. Change a copy of it, or use invact.patch, which checkpoints nothing."
        )
    modules = [] if block is None else block.modules()
    buffers = [m._buffers for m in modules if isinstance(m, WITH_RUNNING_STATISTICS)]
    own = [dict(each) for each in buffers]
    for each in buffers:
        each.update({name: None if buffer is None else buffer.clone() for name, buffer in each.items()})
    try:
        yield
    finally:
        for each, before in zip(buffers, own, strict=True):
            each.update(before)


def with_a_switch_around(model: nn.Module, checkpointed: Sequence[str]) -> Iterator[nn.Module]:
    """The models of transformers around their layers that are checkpointed: a cache would be written to twice."""
    layers = [path for path in checkpointed if has_own_switch(type(model.get_submodule(path)))]
    for path, module in model.named_modules():
        within = f"{path}." if path else ""
        around = not has_own_switch(type(module)) and any(layer.startswith(within) for layer in layers)
        if around and "gradient_checkpointing" in vars(module):
            yield module


def is_checkpointed(module: nn.Module) -> bool:
    """Whether one of our classes checkpoints it, or the switch is on that its own has."""
    if isinstance(module, Patched) and module._invact_checkpoints:
        return True
    return has_own_switch(type(module)) and bool(getattr(module, "gradient_checkpointing", False))
