"""FewBit as it was published, to compare with: coarse derivatives at every site, also where something exact helps."""

from __future__ import annotations

import torch
from torch import nn

from invact.errors.checks import Inputs, check_few_bits
from invact.planning.plans import decide
from invact.report.report import Report


def approximate_everywhere(
    model: nn.Module, example_inputs: Inputs | None = None, *, few_bits: int, autocast: torch.dtype | None = None
) -> Report:
    """FewBit as published, in place, to compare with: every activation that keeps more than its output keeps k bits.

    `few_bits` on `patch` is what to train with: it does so only where nothing exact helps. Here nothing is inverted and
    nothing is derived. `unpatch` takes it back.

    Args:
        model, example_inputs, autocast: as of `invact.plan`, whose errors are raised.
        few_bits: 1 to 4 bits per element.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> report = approximate_everywhere(model, (torch.randn(8, 64),), few_bits=2)
        >>> [site.action for site in report.sites], report.bytes_before - report.bytes_after
        (['approximate'], 7680)
    """
    check_few_bits(few_bits)
    decided = decide(model, example_inputs, autocast=autocast, few_bits=few_bits, everywhere=True)
    decided.apply(model)
    return decided.report
