"""What a node of autograd's graph keeps: the handle itself, for which no recipe is run."""

from __future__ import annotations

import itertools
import threading
from typing import Any

from torch import Tensor

from invact.deriving.handles import Handle
from invact.pytorch.backward import node_name
from invact.pytorch.saved_tensor_hooks import nodes_made, shows_what_is_kept

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
