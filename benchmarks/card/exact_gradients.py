"""Part "exact": gradients against stock's, bit for bit with `exact=True`, relative errors otherwise."""

from __future__ import annotations

from typing import Any

import torch
from card_models import EXACT_SPECS, model_and_inputs
from record import Record
from steppers import Stepper, bits_equal, difference
from torch import nn
from ways import EXACT, INVACT

import invact
from invact.bench.ways import stock

PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "autocast": (torch.float32, torch.bfloat16),
}


def measure(item: str, record: Record, tiny: bool, prepared: None) -> None:
    """Item: a key of `card_models.EXACT_SPECS`."""
    for precision, (dtype, autocast) in PRECISIONS.items():
        spec = EXACT_SPECS[item]
        model, inputs_of = model_and_inputs(spec, tiny, spec.tokens, dtype)
        record[f"{item} {precision}"] = _compared(model, inputs_of(spec.batch), autocast)


def _compared(model: nn.Module, inputs: Any, autocast: torch.dtype | None) -> dict[str, Any]:
    device = next(model.parameters()).device

    def around() -> torch.autocast:
        return torch.autocast(device.type, autocast, enabled=autocast is not None)

    stepper = Stepper(model, inputs, stock, around)
    gradients = stepper.gradients()
    again = [stepper.gradients() for _ in range(2)]
    found: dict[str, Any] = {
        "stock_repeats_itself": all(bits_equal(each, gradients) for each in again),
        "stock_off": max(difference(each, gradients)["whole"] for each in again),
    }
    for way in (EXACT, INVACT):
        report = invact.patch(stepper.model, inputs, autocast=autocast, exact=way == EXACT)
        ours = stepper.gradients()
        invact.unpatch(stepper.model)
        found[way] = {
            "bit_for_bit": bits_equal(ours, gradients),
            "off": difference(ours, gradients)["whole"],
            "saving": report.saving,
        }
    return found
