"""How backward gets a tensor back that a handle stands for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from invact.deriving.handles import Handle, Kept
from invact.deriving.log_probabilities import LogProbabilities
from invact.deriving.saved_by_node import asked
from invact.inverting import autograd_functions
from invact.pytorch.backward import engine_call
from invact.pytorch.circumstances import autocast_anywhere
from invact.pytorch.devices import accelerator_type
from invact.pytorch.saved_tensor_hooks import shows_what_is_kept


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


# Who only reads what it kept: the nodes of PyTorch, and our own inverted activations.
_ENGINE = engine_call.__code__
_OURS = autograd_functions.__dict__


@contextmanager
def _as_recorded() -> Iterator[None]:
    devices = [device for device in ("cpu", accelerator_type()) if torch.is_autocast_enabled(device)]
    with torch.no_grad(), ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
