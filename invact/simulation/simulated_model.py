"""A model's weights and inputs as simulated tensors, for the length of a block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from invact.errors.checks import Inputs
from invact.errors.own_errors import users_call
from invact.pytorch.containers import tree_map_only
from invact.pytorch.fake_tensors import FakeTensorMode
from invact.simulation.setting import Setting, device_of, stand_in
from invact.snapshot.snapshot import as_it_was

ONE_AT_A_TIME = threading.RLock()
"""Held by who swaps a model's parameters for fake ones and back: one at a time in a process."""


@contextmanager
def simulated(
    model: nn.Module, inputs: Inputs, setting: Setting, mode: FakeTensorMode
) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """The model's weights and the inputs as simulated tensors; after the block the model is what it was."""
    device, moved = stand_in(setting.device), setting.device != device_of(model)
    with ONE_AT_A_TIME, as_it_was(model, inputs), mode:
        weights = {name: _fake(mode, tensor, device, moved) for name, tensor in weights_of(model).items()}
        yield weights, tree_map_only(Tensor, lambda tensor: _fake(mode, tensor, device, moved), inputs)


def _fake(mode: FakeTensorMode, tensor: Tensor, device: torch.device, moved: bool) -> Tensor:
    """A simulated tensor on `device`, or, of a model that is planned for where it is, where it is."""
    if not moved and not tensor.is_meta:
        device = tensor.device
    fake: Tensor
    if tensor.device == device:
        fake = users_call(mode.from_tensor, tensor)
    else:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    # A parameter among simulated tensors as well: what is made of parameters is not derived as other tensors are.
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, tensor.requires_grad)
    return fake.detach().requires_grad_(tensor.requires_grad)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their dotted names, as torch.func.functional_call takes them."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
