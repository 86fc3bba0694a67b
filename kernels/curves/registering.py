"""A program's own curves: registered under a name, after a look at whether their derivatives are right."""

from __future__ import annotations

import torch
from torch import Tensor

from ..own_thread import in_own_thread
from .catalogue import CURVES, FIXED_CURVES, OURS, add
from .curve import Curve
from .monotone import Monotone

TOLERANCE = 1e-6  # of f', absolute and of itself, in float64: what even fp32 can not tell
SECOND_TOLERANCE = 1e-3  # of f'': ours of two-sided curves are the derivatives of fitted polynomials
FAR = (30.3, 100.7, 1003.9)


def register(curve: Curve) -> Curve:
    """Make a curve of your own one of `CURVES`: models' activations are then recognised as it, and inverted.

    Register it before models are planned or patched; what has been patched stays as it is. Where two curves compute the
    same, a module is taken for the one that was there first. There is no kernel in Triton for it: on a GPU its backward
    is PyTorch's operators, which allocate what lies between them, or what `torch.compile` makes of them.

    Checked, once, in float64 on some 4,000 numbers between -12 and 12 and a few as far as 1,000: that f gives a number
    for each number; that f' from x and f' from y are what autograd gives of f, to 1e-6; and that f'' from y is what it
    gives of f' from x, to 1e-3; each wherever autograd gives a number. What else must hold, and is not looked at,
    `Monotone` says.

    Args:
        curve: a `Monotone`, or another `Curve` whose y and one bit tell f'.

    Returns:
        The curve, for `invact.functional.invert`.

    Raises:
        ValueError: its name is taken, or one of the above is not so; it is then not registered.

    Example:
        >>> import torch, invact
        >>> from invact.kernels import Monotone, register, unregister
        >>> asinh = register(
        ...     Monotone(
        ...         name="asinh",
        ...         f=torch.asinh,
        ...         derivative=lambda x: torch.rsqrt(1 + x * x),
        ...         of_output=lambda y: 1 / torch.cosh(y),
        ...         rise=lambda y: -torch.tanh(y) / torch.cosh(y),
        ...     )
        ... )
        >>> class Asinh(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.asinh(x)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), Asinh(), torch.nn.Linear(8, 8))
        >>> report = invact.patch(model, (torch.randn(2, 8),))
        >>> [(site.activation, site.action) for site in report.sites]
        [('asinh', 'invert')]
        >>> unregister("asinh")
    """
    check(curve)
    add(curve)
    return curve


def unregister(name: str) -> None:
    """Take a curve that was registered out again. Models that were patched with it go on as they are.

    Raises:
        ValueError: no such curve was registered, or it came with invact.
    """
    if name in OURS:
        raise ValueError(f"{name!r} came with invact, which needs it. Only a curve that was registered can go.")
    if name not in CURVES:
        raise ValueError(f"No curve called {name!r} was registered. Those there are: {', '.join(CURVES)}.")
    FIXED_CURVES.remove(CURVES.pop(name))


def check(curve: Curve) -> None:
    """Looks at a curve as `register` says it; raises ValueError with the first x where it is not what autograd gives.

    In a thread of its own, since it may be called under any mode of PyTorch's.
    """
    in_own_thread(lambda: _check(curve))


def _check(curve: Curve) -> None:
    needed = ("f", "derivative", "rise", "of_output") if type(curve).slope is Monotone.slope else ("f", "derivative")
    for name in needed:
        if not callable(getattr(curve, name)):
            raise ValueError(
                f"The curve {curve.name!r} has {getattr(curve, name)!r} where its function `{name}` should be. Give a "
                "function that takes a tensor of numbers and gives one of the same shape."
            )
    x = _grid().requires_grad_()
    y = curve.f(x)
    if not isinstance(y, Tensor) or (y.shape, y.dtype) != (x.shape, x.dtype) or not y.requires_grad:
        raise ValueError(
            f"The curve {curve.name!r} is none: its `f` must give, of a tensor of numbers, one of the same shape and "
            "dtype that autograd can differentiate. Give such an `f`."
        )
    (slope,) = torch.autograd.grad(y.sum(), x)
    from_x = curve.derivative(x)
    second = torch.zeros_like(slope)  # by way of `derivative`: not every operator can be differentiated twice
    if from_x.requires_grad:
        (second,) = torch.autograd.grad(from_x.sum(), x, materialize_grads=True)
    x, y = x.detach(), y.detach()
    side = curve.sides(x) if curve.has_side else None
    from_y = curve.slope(y, side, y.dtype)
    by_y = curve.slope_rise(y, side, y.dtype) * from_y
    _compare(curve, "f' from x (`derivative`)", x, from_x.detach(), slope, TOLERANCE)
    _compare(curve, "f' from y (`of_output` of a Monotone, else `slope`)", x, from_y, slope, TOLERANCE)
    _compare(curve, "f'' (f' times `rise` of a Monotone, else times `slope_rise`)", x, by_y, second, SECOND_TOLERANCE)


def _grid() -> Tensor:
    """Numbers at none of which a curve is likely to have a kink."""
    near = torch.linspace(-12.1, 12, 4000, dtype=torch.float64, device="cpu")
    far = torch.tensor(FAR, dtype=torch.float64, device="cpu")
    return torch.cat([-far, near, far])


def _compare(curve: Curve, which: str, x: Tensor, told: Tensor, expected: Tensor, tolerance: float) -> None:
    wrong = ~((told - expected).abs() <= tolerance * (1 + expected.abs()))
    wrong &= expected.isfinite()  # far out many a formula that holds is differentiated to no number
    if wrong.any():
        first = int(wrong.nonzero()[0])
        at, ours, autograds = (values[first].item() for values in (x, told.expand_as(x), expected))
        raise ValueError(
            f"The curve {curve.name!r} tells a wrong derivative: its {which} is {ours:.6g} at x = {at:.4g}, where "
            f"autograd gives {autograds:.6g}. Mend the one or the other; it is not registered."
        )
