"""Part "profile": where a patched step spends other time than a stock one, kernel by kernel."""

from __future__ import annotations

from typing import Any

import torch
from card_models import DEVICE, batch_of, model_and_inputs
from record import Record
from torch.profiler import ProfilerActivity, profile
from ways import INVACT, STOCK, Stepper, eager_ways

from invact.planning import decide

LONGEST_LIST = 10
NAME_LENGTH = 90


def measure(item: str, record: Record, tiny: bool) -> None:
    """Item: a key of `card_models.SPECS`."""
    model, inputs_of = model_and_inputs(item, tiny)
    inputs = inputs_of(batch_of(item, tiny))
    ways = eager_ways(model, decide(model, inputs))
    stepper = Stepper(model, model, inputs)
    took = {name: _microseconds_by_kernel(stepper, ways[name]) for name in (STOCK, INVACT)}
    stock, ours = took[STOCK], took[INVACT]
    rows = [
        {"name": name[:NAME_LENGTH], "stock_us": stock.get(name, 0.0), "invact_us": ours.get(name, 0.0)}
        for name in stock | ours
    ]
    rows.sort(key=lambda row: -abs(row["invact_us"] - row["stock_us"]))
    record[item] = {
        "stock_us": sum(stock.values()),
        "invact_us": sum(ours.values()),
        "differences": rows[:LONGEST_LIST],
        "longest_of_stock": dict(sorted(stock.items(), key=lambda pair: -pair[1])[:LONGEST_LIST]),
    }


def _microseconds_by_kernel(stepper: Stepper, way: Any) -> dict[str, float]:
    """Of one step, after two that are not counted; on a CPU by operator."""
    on_cuda = DEVICE.type == "cuda"
    stepper.seconds(way)
    stepper.seconds(way)
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as seen:
        stepper.seconds(way)
    if not on_cuda:
        return {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    cuda = torch.autograd.DeviceType.CUDA
    return {event.key: event.self_device_time_total for event in seen.key_averages() if event.device_type == cuda}
