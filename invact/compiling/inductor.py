"""torch.compile(model, backend="invact"): inductor, whose backward computes again whatever is no matrix product.

PyTorch finds `backend` by the entry point in `pyproject.toml`. What a compiled forward keeps is decided by inductor's
partitioner, a minimal cut through the graph of forward and backward, which by default keeps much that it could compute
again. Its setting `aggressive_recomputation` takes all its reserves away, and too many of them: with it alone random
numbers are drawn anew in backward, which gives wrong gradients, and the CPU's attention and other libraries' kernels
run twice. So what must be kept is marked here: everything but the operations that PyTorch recomputes by itself and
those few that are named below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from invact.compiling.compiler_inside import (
    CustomGraphPass,
    Inductor,
    get_default_op_list,
    get_hash_for_files,
    inductor_settings,
    partitioner_settings,
)

PASS = "joint_custom_post_pass"
"""Inductor's option for a pass over the graph of forward and backward, the last before it is parted."""

_RECOMPUTED_BY_PYTORCH = frozenset(get_default_op_list().recomputable_ops)

# They only move memory; and inductor's random numbers are a function of a seed, which is kept.
_RECOMPUTED_BESIDES = frozenset(
    [
        torch.ops.aten.embedding,
        torch.ops.aten.cat,
        torch.ops.aten.constant_pad_nd,
        torch.ops.aten.repeat,
        torch.ops.prims.inductor_random,
    ]
)


def backend(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles one graph as inductor does, but keeps less of it for backward; what torch.compile calls.

    Nothing is set for other graphs, and `mode` and `options` mean what they mean to inductor.

    Raises:
        ValueError: inductor has no such option.
        RuntimeError: inductor has no such mode, or an option is of the wrong type; its own words.

    Example:
        >>> layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.LayerNorm(8))
        >>> compiled = torch.compile(layers, backend="invact")
    """
    for name in options or {}:
        if not hasattr(inductor_settings, name.replace("-", "_")):
            raise ValueError(
                f"Inductor, which the backend 'invact' compiles with, has no option {name!r}. "
                "torch._inductor.list_options() names those that there are."
            )
    inductor = Inductor(mode, options, None)
    theirs = inductor.config.get(PASS, getattr(inductor_settings, PASS))
    inductor.config[PASS] = MarksWhatIsKept(theirs)
    with reserves_off():
        compiled: Callable[..., Any] = inductor(graph, inputs)
    return compiled


def reserves_off() -> AbstractContextManager[None]:
    """A block in which the partitioner computes again all that is not marked.

    It has to hold while a forward is compiled: the backward, compiled at once or later, is given what was decided then.
    """
    block: AbstractContextManager[None] = partitioner_settings.patch(aggressive_recomputation=True)
    return block


class MarksWhatIsKept(CustomGraphPass):
    """The pass of this backend: runs the user's own one, if there is any, and marks what is to be kept.

    PyTorch names it in the keys of its caches, by its attributes or by `uuid`, as the release has it.
    """

    def __init__(self, theirs: Any = None) -> None:
        self.theirs = [] if theirs is None else list(theirs) if isinstance(theirs, (list, tuple)) else [theirs]
        self.version = get_hash_for_files((__file__,))  # what is marked is told in this file

    def __call__(self, graph: fx.Graph) -> None:
        for each in self.theirs:
            each(graph)
        mark_what_is_kept(graph)

    def uuid(self) -> Any:
        """None, which keeps the graph out of the caches, if a pass of the user's has no name."""
        names = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.theirs]
        return None if None in names else ("invact", self.version, *names)


def mark_what_is_kept(graph: fx.Graph) -> None:
    """Marks what backward is not to compute again; a mark of the user's, from checkpointing, stands."""
    for node in graph.nodes:
        if node.op == "call_function" and not _may_be_recomputed(node.target):
            node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)


def _may_be_recomputed(operation: Any) -> bool:
    if torch.Tag.nondeterministic_seeded in getattr(operation, "tags", ()):
        return False
    packet = getattr(operation, "overloadpacket", operation)
    return packet in _RECOMPUTED_BY_PYTORCH or packet in _RECOMPUTED_BESIDES
