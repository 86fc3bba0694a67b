"""Part "kernels": single activations without autograd, against stock's operators and a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from card_models import DEVICE
from record import Record
from torch import Tensor
from verdicts import verdict_on_kernels
from ways import INVACT, STOCK

from invact.bench.timing import Race, kernel_seconds
from invact.kernels import CURVES, backward, forward, storage_order

ELEMENTS = 1 << 26
CASES = (
    ("gelu", torch.bfloat16),
    ("silu", torch.bfloat16),
    ("gelu_tanh", torch.bfloat16),
    ("gelu", torch.float16),
    ("silu", torch.float16),
    ("gelu", torch.float32),
    ("silu", torch.float32),
)

aten = torch.ops.aten
STOCK_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": aten.gelu_backward,
    "gelu_tanh": partial(aten.gelu_backward, approximate="tanh"),
    "silu": aten.silu_backward,
}


def measure(item: str, record: Record, tiny: bool, prepared: None) -> None:
    """Item "alone"."""
    for name, dtype in CASES:
        key = f"{name} {str(dtype).removeprefix('torch.')}"
        found = _alone(name, dtype, 1 << 12 if tiny else ELEMENTS, 2 if tiny else 5)
        record[key] = found | {"verdict": verdict_on_kernels(key, found)}
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def _alone(name: str, dtype: torch.dtype, elements: int, rounds: int) -> dict[str, Any]:
    """By pass: times, ratio to stock's, and share of what a copy reaches that moves as many bytes as our kernel must;
    "both": passes together, as a ratio to stock's."""
    curve = CURVES[name]
    x, dy = (torch.randn(elements, device=DEVICE, dtype=dtype) for _ in range(2))
    y, side = forward(x, curve)
    passes: dict[str, tuple[int, dict[str, Callable[[], object]]]] = {
        "forward": (2 * x.nbytes + side.nbytes, {STOCK: lambda: curve.f(x), INVACT: lambda: forward(x, curve)}),
        "backward": (
            3 * x.nbytes + side.nbytes,
            {
                STOCK: lambda: STOCK_BACKWARD[name](dy, x),
                INVACT: lambda: backward(dy, y, side, curve, storage_order(y)),
            },
        ),
    }
    found: dict[str, Any] = {}
    for passed, (moved, calls) in passes.items():
        calls["copy"] = copy_of(moved)
        race = Race()
        for call in calls.values():
            call()
        race.run({who: partial(seconds_of, call) for who, call in calls.items()}, rounds)
        found[passed] = {
            "microseconds": {who: 1e6 * race.median(who) for who in calls},
            "ratio": race.ratio(INVACT),
            "of_copy": 1 / race.ratio(INVACT, "copy"),
            "copy_bytes_per_second": moved / race.median("copy"),
        }
    ours, stocks = (
        sum(found[passed]["microseconds"][who] for passed in ("forward", "backward")) for who in (INVACT, STOCK)
    )
    return found | {"both": ours / stocks}


def copy_of(moved: int) -> Callable[[], object]:
    """A copy within the device's memory that reads and writes `moved` bytes in all."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE).random_()
    return partial(torch.empty_like(source).copy_, source)


def seconds_of(call: Callable[[], object]) -> float:
    """What the device takes for it."""
    return kernel_seconds(lambda _: call(), lambda: None, DEVICE)
