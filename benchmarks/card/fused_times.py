"""Part "fused": kernels that do in one pass what takes PyTorch several operators, against those operators.

Masks in bits, gated products, and RMS norms by one operator instead of in steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from card_models import DEVICE
from kernel_times import ELEMENTS, copy_of, seconds_of
from record import Record
from torch import Tensor, nn
from verdicts import verdict_on_fused
from ways import INVACT, STOCK

from invact.bench.timing import Race
from invact.kernels import gated, masks
from invact.kernels.dispatch import may_run_triton
from invact.kernels.pytorch import packing
from invact.recognition.fused_rms_norm import RmsNorm

DTYPE = torch.bfloat16
KEPT = 0.9  # of the mask
WIDTH = 4096  # of the norms
EPS = 1e-6

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        moved: bytes that one pass over the tensors must read and write, in all of `passes` together.
        passes: by name, such as "forward", PyTorch's way and ours.
    """

    moved: int
    passes: Mapping[str, tuple[Call, Call]]


def measure(item: str, record: Record, tiny: bool, prepared: None) -> None:
    """Item: a key of `CASES`."""
    for name, make in CASES[item].items():
        case = make(1 << 14 if tiny else ELEMENTS)
        record[name] = {"absent": case} if isinstance(case, str) else _timed(case, 2 if tiny else 5)
        del case
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def _timed(case: Case, rounds: int) -> dict[str, Any]:
    """By pass: times and ratio to PyTorch's way; of all passes, the share of what a copy reaches."""
    turns = {"copy": partial(seconds_of, copy_of(case.moved))}
    for name, (theirs, ours) in case.passes.items():
        turns |= {f"{name} {STOCK}": partial(seconds_of, theirs), f"{name} {INVACT}": partial(seconds_of, ours)}
    for take_turn in turns.values():
        take_turn()
    race = Race()
    race.run(turns, rounds)
    passes = {
        name: {
            "microseconds": {who: 1e6 * race.median(f"{name} {who}") for who in (STOCK, INVACT)},
            "ratio": race.ratio(f"{name} {INVACT}", f"{name} {STOCK}"),
        }
        for name in case.passes
    }
    seconds = sum(race.median(f"{name} {INVACT}") for name in case.passes)
    return {
        "passes": passes,
        "of_copy": race.median("copy") / seconds,
        "copy_bytes_per_second": case.moved / race.median("copy"),
        "verdict": verdict_on_fused(max(each["ratio"] for each in passes.values())),
    }


# --- masks --------------------------------------------------------------------------------------------


def _pack(elements: int) -> Case:
    mask = _mask(elements)
    passes = {"pack": (lambda: packing.packed(mask), lambda: masks.packed(mask))}
    return Case(elements + elements // 8, passes)


def _unpack(elements: int) -> Case:
    bits = packing.packed(_mask(elements))
    passes = {"unpack": (lambda: packing.unpacked(bits, elements), lambda: masks.unpacked(bits, elements))}
    return Case(elements + elements // 8, passes)


def _drop(elements: int) -> Case:
    x, bits, scale = _normal(elements), packing.packed(_mask(elements)), 1 / KEPT

    def by_operators() -> object:
        return torch.ops.aten.native_dropout_backward(x, packing.unpacked(bits, elements), scale)

    passes = {"drop": (by_operators, lambda: masks.dropped(x, bits, x.stride(), scale))}
    return Case(2 * x.nbytes + bits.nbytes, passes)


def _mask(elements: int) -> Tensor:
    return torch.rand(elements, device=DEVICE) < KEPT


# --- gated products -----------------------------------------------------------------------------------


def _gated(elements: int) -> Case | str:
    """Both ways give act(g) and act(g) * u."""
    g, u = _normal(elements), _normal(elements)

    def by_operators() -> tuple[Tensor, Tensor]:
        a = F.silu(g)
        return a, a * u

    if gated.gated(g, u, "silu") is None:
        return "its bits are not stock's here" if may_run_triton(g) else "there is no Triton here"
    return Case(4 * g.nbytes, {"make": (by_operators, lambda: gated.gated(g, u, "silu"))})


# --- norms --------------------------------------------------------------------------------------------


def _norm(name: str, offset: int, elements: int) -> Case:
    """A norm of transformers, imported only here, in steps and fused; through autograd, and backward of a graph that is
    kept: no gradient is added to another."""
    place, _, kind = name.rpartition(".")
    module: nn.Module = getattr(import_module(f"transformers.models.{place}"), kind)(WIDTH, EPS)
    norm = RmsNorm("weight", EPS, offset)
    module = module.to(DEVICE, DTYPE)
    weight = module.get_parameter(norm.weight)
    x, dy = (_normal(elements).view(-1, WIDTH) for _ in range(2))
    x.requires_grad_()

    def backward(y: Tensor) -> Call:
        return lambda: torch.autograd.grad(y, (x, weight), dy, retain_graph=True)

    passes = {
        "forward": (lambda: module(x), lambda: norm(x, weight)),
        "backward": (backward(module(x)), backward(norm(x, weight))),
    }
    return Case(norm.accesses(DTYPE) * elements, passes)


def _normal(elements: int) -> Tensor:
    return torch.randn(elements, device=DEVICE, dtype=DTYPE)


CASES: dict[str, dict[str, Callable[[int], Case | str]]] = {
    "masks": {"mask to bits": _pack, "bits to mask": _unpack, "dropped by bits": _drop},
    "gated": {"silu(g) * u": _gated},
    "norms": {
        "Llama's norm": lambda elements: _norm("llama.modeling_llama.LlamaRMSNorm", 0, elements),
        "Gemma's norm": lambda elements: _norm("gemma.modeling_gemma.GemmaRMSNorm", 1, elements),
    },
}
