"""Hooks on the tensors that autograd keeps: ours among those of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from invact.pytorch.version_check import found

# Hooks on kept tensors set outside of ours: what is really kept must go through them, or they would not see it.
_top_hooks: Callable[[bool], Any] = found(found(torch._C, "_autograd"), "_top_saved_tensors_default_hooks")
_push_hooks: Callable[[Any, Any], None] = found(torch._C._autograd, "_push_saved_tensors_default_hooks")
_pop_hooks: Callable[[], None] = found(torch._C._autograd, "_pop_saved_tensors_default_hooks")

# Whether such hooks may be set here: entering them where torch.func forbids it raises.
hooks_allowed: Callable[[], bool] = found(torch._C._autograd, "_saved_tensors_hooks_is_enabled")

# What torch.func, and whoever else can not stand such hooks, enters: a model that does so inside could not be planned.
torch_graph: Any = torch.autograd.graph
found(torch_graph, "disable_saved_tensors_hooks")

# Whether a node shows what hooks gave for a tensor that it keeps; 2.8 and 2.9 give it to the unpacking hook alone.
shows_what_is_kept: bool = hasattr(found(torch._C._autograd, "SavedTensor"), "data")

# How many nodes the graphs of this thread have had so far, by which these PyTorches' nodes are told that kept something
# with our hooks: with somebody else's, asking would run a checkpointed region anew.
nodes_made: Callable[[], int] = found(torch._C._autograd, "_get_sequence_nr")


def outer_hooks() -> Any:
    """The innermost hooks on kept tensors, as (pack, unpack), or None."""
    return _top_hooks(False)


@contextmanager
def hooks_taken_off(ours: Callable[[Any], bool]) -> Iterator[None]:
    """Without the innermost hooks on kept tensors for the length of a block, as far as `ours` says so of their pack."""
    off: list[tuple[Any, Any]] = []
    while (hooks := outer_hooks()) is not None and ours(hooks[0]):
        off.append(hooks)
        _pop_hooks()
    try:
        yield
    finally:
        for hooks in reversed(off):
            _push_hooks(*hooks)
