"""Where a patched step spends other time than a stock one, kernel by kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from steppers import Stepper
from torch.profiler import ProfilerActivity, profile
from ways import INVACT, STOCK

LONGEST_LIST = 10
NAME_LENGTH = 90


def kernels_beside(steppers: Mapping[str, Stepper]) -> dict[str, Any]:
    """Of one step each, both warm: microseconds in all, and by the kernels that differ most; on a CPU by operator."""
    stock, ours = (_microseconds_by_kernel(steppers[name]) for name in (STOCK, INVACT))
    rows = [
        {"name": name[:NAME_LENGTH], "stock_us": stock.get(name, 0.0), "invact_us": ours.get(name, 0.0)}
        for name in stock | ours
    ]
    rows.sort(key=lambda row: -abs(row["invact_us"] - row["stock_us"]))
    return {
        "stock_us": sum(stock.values()),
        "invact_us": sum(ours.values()),
        "differences": rows[:LONGEST_LIST],
        "longest_of_stock": dict(sorted(stock.items(), key=lambda pair: -pair[1])[:LONGEST_LIST]),
    }


def _microseconds_by_kernel(stepper: Stepper) -> dict[str, float]:
    on_cuda = stepper.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as seen:
        stepper.seconds()
    if not on_cuda:
        return {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    cuda = torch.autograd.DeviceType.CUDA
    return {event.key: event.self_device_time_total for event in seen.key_averages() if event.device_type == cuda}
