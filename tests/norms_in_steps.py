"""What tests of norms written in steps share: weights that tell them apart, and a CPU that passes for a GPU."""

from __future__ import annotations

import pytest
from torch import nn

from invact.planning import places
from invact.recognition import fused_rms_norm as norms
from invact.simulation import as_on_gpu


def vary_weights_of_norms(model: nn.Module) -> None:
    for module in model.modules():
        if "Norm" in type(module).__name__:
            nn.init.normal_(module.weight, 0.8, 0.2)


def as_if_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the fused operator were one kernel on this CPU: it is PyTorch's own composition of it that runs."""
    for module in (norms, places, as_on_gpu):
        monkeypatch.setattr(module, "has_fused_rms_norm", lambda device: True)
