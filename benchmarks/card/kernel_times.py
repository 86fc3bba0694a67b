"""Part "kernels": single activations, through autograd and the kernels alone, against stock and a device copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from invact.kernels import CURVES, backward, forward, storage_order
from record import Record
from torch import Tensor

from invact.bench import KERNELS
from invact.bench import run as bench
from invact.timing import Race, kernel_seconds

ELEMENTS = 1 << 26
NAMES = ("gelu", "silu", "gelu_tanh", "quick_gelu", "mish", "hardswish", "elu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

aten = torch.ops.aten
STOCK_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": aten.gelu_backward,
    "gelu_tanh": partial(aten.gelu_backward, approximate="tanh"),
    "silu": aten.silu_backward,
    "mish": aten.mish_backward,
    "hardswish": aten.hardswish_backward,
    "elu": lambda dy, x: aten.elu_backward(dy, 1.0, 1.0, 1.0, False, x),
}
"""Stock's one kernel for the gradient; quick_gelu's is several."""


def measure(item: str, record: Record, tiny: bool) -> None:
    """Item "alone" or "autograd"."""
    elements, rounds = (1 << 12, 2) if tiny else (ELEMENTS, 3)
    for dtype in DTYPES:
        for name in NAMES:
            key = f"{item} {name} {str(dtype).removeprefix('torch.')}"
            if item == "alone":
                record[key] = _alone(name, dtype, elements, rounds)
            else:
                found = bench(
                    KERNELS,
                    curves=[name],
                    dtypes=[dtype],
                    against=["stock"],
                    elements=elements,
                    rounds=rounds,
                    device=DEVICE,
                )
                record[key] = {each.passed: _with_shares(each) for each in found.kernels}
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()


def _with_shares(times: Any) -> dict[str, Any]:
    return {
        who: {"seconds": times.race.median(who), "ratio": times.race.ratio(who), "of_copy": times.of_copy(who)}
        for who in times.race.seconds
    }


def _alone(name: str, dtype: torch.dtype, elements: int, rounds: int) -> dict[str, Any]:
    """Without autograd; the copy moves as many bytes as our kernel must."""
    curve = CURVES[name]
    x, dy = (torch.randn(elements, device=DEVICE, dtype=dtype) for _ in range(2))
    y, side = forward(x, curve)
    passes: dict[str, tuple[int, dict[str, Callable[[], object]]]] = {
        "forward": (2 * x.nbytes + side.nbytes, {"stock": lambda: curve.f(x), "invact": lambda: forward(x, curve)}),
        "backward": (
            3 * x.nbytes + side.nbytes,
            {"invact": lambda: backward(dy, y, side, curve, storage_order(y))},
        ),
    }
    if name in STOCK_BACKWARD:
        passes["backward"][1]["stock"] = lambda: STOCK_BACKWARD[name](dy, x)
    found: dict[str, Any] = {}
    for passed, (moved, calls) in passes.items():
        source = torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE).random_()
        target = torch.empty_like(source)
        calls["copy"] = partial(target.copy_, source)
        race = Race()
        for call in calls.values():
            call()
        race.run({who: partial(_seconds, call) for who, call in calls.items()}, rounds)
        found[passed] = {
            "microseconds": {who: 1e6 * race.median(who) for who in calls},
            "ratio": race.ratio("invact", "stock") if "stock" in calls else None,
            "of_copy": 1 / race.ratio("invact", "copy"),
            "copy_bytes_per_second": moved / race.median("copy"),
        }
    return found


def _seconds(call: Callable[[], object]) -> float:
    return kernel_seconds(lambda _: call(), lambda: None, DEVICE)
