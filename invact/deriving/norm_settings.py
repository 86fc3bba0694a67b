"""What a norm was told in its call and autograd does not record, read from the frame of its function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from invact.deriving.handles import Kept


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
NORMS = {
    F.layer_norm.__code__: "eps",
    F.rms_norm.__code__: "eps",
    F.group_norm.__code__: "eps and bias",
    F.batch_norm.__code__: "eps and bias",
    F.instance_norm.__code__: "eps and bias",
}

STATISTICS_WITH_HISTORY = ("NativeGroupNormBackward0", "FusedRmsNormBackward0")

# Nodes that do not know all the settings; see `NormSettings`.
TOLD_IN_THEIR_CALL = {
    "NativeLayerNormBackward0",
    "FusedRmsNormBackward0",
    "NativeGroupNormBackward0",
    "NativeBatchNormBackward0",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
}


def norm_settings(frame: Any, told: str, kept: Callable[[Tensor], Kept]) -> NormSettings:
    """Of a norm's function that is running in `frame`; `told` is what `NORMS` has for it, `kept` makes handles."""
    local = frame.f_locals
    if told == "eps":
        return NormSettings(local["eps"])
    bias, mean, var = local["bias"], local.get("running_mean"), local.get("running_var")
    images = local["input"].shape[0] if frame.f_code is F.instance_norm.__code__ else 1
    bias = bias if bias is None or images == 1 else bias.repeat(images)
    running = None if mean is None or var is None else (mean, var)
    return NormSettings(local["eps"], None if bias is None else kept(bias), running, images)
