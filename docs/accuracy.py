"""Measure how exact the derivative is: ``python docs/accuracy.py`` writes docs/accuracy_table.md and docs/accuracy.svg.

Every curve of the catalogue, in bf16, fp16 and fp32, against the derivative in float64. Errors are weighted by how
likely an input is under N(0, 1). In 16 bits all values that there are take part; in fp32 all within 0.1 of the minimum,
where the error sits, and 256 runs of 4096 neighbouring values elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import date
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from invact.inverting.autograd_functions import invert
from invact.kernels import CURVES, Curve

matplotlib.use("svg")
from matplotlib import pyplot as plt

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NEAR = 0.1  # fp32: as far from the minimum every value is tried
RUNS, RUN = 256, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures how exact the derivative of every curve is.")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent, help="the folder to write to")
    folder = parser.parse_args().into
    columns = ["ours", "floor", "floor, rounded", "stock"]
    rows = [[f"`{curve.name}`", name, *row(curve, name)] for curve in CURVES.values() for name in DTYPES]
    theirs = [["`gelu`", name, published_error(name)] for name in DTYPES]
    version = torch.__version__.partition("+")[0]
    text = [
        f"Made by `python docs/accuracy.py` on {date.today()} with torch {version} on a CPU.",
        "",
        *table(["curve", "dtype", *columns], rows),
        "",
        "The published approximation of GELU's derivative, worked out in float64 from the rounded y and rounded to the "
        "dtype, by the same measure:",
        "",
        *table(["curve", "dtype", "as published"], theirs),
        "",
    ]
    (folder / "accuracy_table.md").write_text("\n".join(text), encoding="utf-8")
    plot(folder / "accuracy.svg")
    print("\n".join(text))


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", "---", *["---:"] * (len(header) - 2)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def row(curve: Curve, dtype_name: str) -> list[str]:
    """The error of each way to come by the derivative."""
    x, y, true, weight, bottom = measured(curve, dtype_name)
    best = floor(x, y, true, weight, bottom)
    found = [
        derivative(x, lambda x: invert(x, curve)),
        best,
        best.to(x.dtype),
        derivative(x, curve.f),
    ]
    return [error(values, true, weight) for values in found]


def published_error(dtype_name: str) -> str:
    x, y, true, weight, bottom = measured(CURVES["gelu"], dtype_name)
    return error(published(y.double(), x.double() < bottom).to(x.dtype), true, weight)


def measured(curve: Curve, dtype_name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Inputs and outputs, the true derivative, the probabilities of the inputs, and where the minimum is."""
    bottom = minimum(curve)
    x, weight = inputs(DTYPES[dtype_name], bottom)
    y = curve.f(x)
    x, y, weight = (values[y.isfinite() & (weight > 0)] for values in (x, y, weight))
    return x, y, curve.derivative(x.double()), weight, bottom


def error(values: Tensor, true: Tensor, weight: Tensor) -> str:
    """The relative L2 error and, in brackets, the largest absolute one."""
    off = values.double() - true
    relative = (weight * off**2).sum().sqrt() / (weight * true**2).sum().sqrt()
    return f"{short(float(relative))} ({short(float(off.abs().max()))})"


def short(number: float) -> str:
    """As 2.9e-3; what float64 itself is off by is 0."""
    if number < 1e-14:
        return "0"
    mantissa, _, exponent = f"{number:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def derivative(x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """What backward gives for an incoming gradient of one."""
    x = x.clone().requires_grad_()
    y = f(x)
    return torch.autograd.grad(y, x, torch.ones_like(y))[0]


def minimum(curve: Curve) -> float:
    """Where the curve is lowest; -inf for one that only rises."""
    grid = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    lowest = int(curve.f(grid).argmin())
    if lowest in (0, len(grid) - 1) or curve.f(grid[0]) <= curve.f(grid[lowest]):
        return -torch.inf
    left, right = float(grid[lowest - 1]), float(grid[lowest + 1])
    for _ in range(60):
        middle = (left + right) / 2
        falls = curve.derivative(torch.tensor(middle, dtype=torch.float64)) < 0
        left, right = (middle, right) if falls else (left, middle)
    return right


# --- which inputs, and how likely each is -------------------------------------------------------------


def inputs(dtype: torch.dtype, bottom: float) -> tuple[Tensor, Tensor]:
    """Rising values of the dtype, and the probability that each stands for under N(0, 1)."""
    if dtype.itemsize == 2:
        patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = patterns[patterns.isfinite()].sort().values
        return x, probabilities(x)
    parts = [part for part in (every_fp32(bottom - NEAR, bottom + NEAR),) if part.numel()]
    weights = [probabilities(part) for part in parts]
    elsewhere = quantiles(RUNS)
    elsewhere = elsewhere[(elsewhere - bottom).abs() > NEAR]
    share = (1 - sum(float(weight.sum()) for weight in weights)) / len(elsewhere)
    for start in elsewhere.float():
        run = (start.view(torch.int32) + torch.arange(RUN, dtype=torch.int32)).view(torch.float32)
        parts.append(run)
        weights.append(torch.full((RUN,), share / RUN, dtype=torch.float64))
    return torch.cat(parts), torch.cat(weights)


def probabilities(x: Tensor) -> Tensor:
    """Of each of the rising values, for x ~ N(0, 1) rounded to the nearest."""
    wide = x.double()
    middles = (wide[1:] + wide[:-1]) / 2
    edges = torch.cat([wide[:1], middles, wide[-1:]]) if x.dtype is torch.float32 else beyond(middles)
    return torch.special.ndtr(edges).diff().clamp(min=0)


def beyond(middles: Tensor) -> Tensor:
    end = torch.tensor([torch.inf], dtype=torch.float64)
    return torch.cat([-end, middles, end])


def every_fp32(low: float, high: float) -> Tensor:
    """Every fp32 value between two negative numbers; none if the first is infinite."""
    if low == -torch.inf:
        return torch.empty(0)
    ends = torch.tensor([low, high]).view(torch.int32)
    return torch.arange(int(ends[0]), int(ends[1]), -1, dtype=torch.int32).view(torch.float32)


def quantiles(count: int) -> Tensor:
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def floor(x: Tensor, y: Tensor, true: Tensor, weight: Tensor, bottom: float) -> Tensor:
    """The best that y and the side allow: the mean derivative of all x that share them."""
    patterns = y.view(torch.int16 if y.dtype.itemsize == 2 else torch.int32).long()
    _, group = (2 * patterns + (x.double() >= bottom)).unique(return_inverse=True)
    mass = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add(0, group, weight)
    mean = torch.zeros_like(mass).index_add(0, group, weight * true) / mass
    return mean[group]


# --- the plot -----------------------------------------------------------------------------------------


def published(y: Tensor, left: Tensor) -> Tensor:
    """GELU's derivative as Novikov & Oseledets approximate it; y in float64.

    The formula and its constants are those of github.com/PgLoLo/optiacts, optiacts/gelu_impl.py at commit 9b50ea8,
    the code of arXiv 2407.15545; written anew for this comparison, with eight digits.
    """
    height = (y + 0.16997121).clamp(min=0)
    u = (height / 0.16997121).clamp(max=1)
    falling = 0.0012176598 - 0.29641210 * u**0.44236329 * (1 - u) ** 0.83127053
    rising = 1 + (-1.3837180 + 1.5584202 * height.sqrt() + 0.044045748 * height) * torch.exp(
        0.032146737 * (-2.1198851 - height) ** 3
    )
    return torch.where(left, falling, rising)


def plot(path: Path) -> None:
    """GELU's derivative around its minimum in bf16, and how far each way is from it."""
    curve = CURVES["gelu"]
    x, weight = inputs(torch.bfloat16, minimum(curve))
    y, true = curve.f(x), curve.derivative(x.double())
    ours = derivative(x, lambda x: invert(x, curve)).double()
    theirs = published(y.double(), x.double() < minimum(curve)).bfloat16().double()
    best = floor(x, y, true, weight, minimum(curve)).bfloat16()
    shown = (x >= -1.1) & (x <= -0.4)
    x, true, ours, theirs, best = (values[shown].double() for values in (x, true, ours, theirs, best))

    plt.rcParams.update({"svg.hashsalt": "invact", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, (top, below) = plt.subplots(2, 1, figsize=(7, 6.4), sharex=True, layout="constrained")
    styles = (
        ("published approximation", theirs, {"color": "#c2410c", "marker": "x", "s": 14, "linewidths": 0.9}),
        ("invact", ours, {"color": "#1d4ed8", "marker": "o", "s": 9, "linewidths": 0}),
    )
    top.plot(x, true, color="#111", linewidth=1, label="truth")
    below.plot(x, best - true, color="#888", linewidth=1, label="the best that y and one bit allow")
    for label, values, style in styles:
        top.scatter(x, values, label=label, **style)
        below.scatter(x, values - true, label=label, **style)
    top.set_ylabel("f'(x)")
    below.set_ylabel("error of f'(x)")
    below.set_xlabel("x, every bf16 value")
    for axes in (top, below):
        axes.axvline(minimum(curve), color="#bbb", linewidth=0.8, linestyle="--", zorder=0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    top.set_title("GELU's derivative around its minimum, in bf16")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
