"""Activations that keep their output for backward instead of their input, with the signatures of torch.nn.functional.

    >>> import torch, invact.functional as F
    >>> x = torch.randn(4, 8, requires_grad=True)
    >>> F.gelu(x).sum().backward()
    >>> x.grad.shape
    torch.Size([4, 8])

Each takes a floating tensor of any shape, strides and memory format, in fp64, fp32, fp16 or bf16, and gives what the
stock operator gives, laid out alike; on a GPU the last digit may differ, and far on the left, where stock's gelu takes
the difference of two numbers near 1, y is nearer to the true value. For backward it keeps y, which the next layer keeps
as well. Where no gradient is asked for, the stock operator runs and nothing is kept. A tensor that is not floating
raises TypeError, a parameter that the curve can not have ValueError.

**Curves with two sides** (gelu, silu, quick_gelu, mish, hardswish) keep one bit per element besides y. The gradient is
f' as far as y and the bit tell it: exact away from the curve's minimum, and next to it, where rounding y hides where x
was, its mean over the x that give the same y and the same bit.

**Monotone curves** (all others) keep y alone. The gradient is within two units in the last place of stock's, except
where the curve levels out and y no longer tells x; each says where.

With ``inplace=True`` y takes the place of x, as in the stock function, and is kept there.
"""

from __future__ import annotations

import torch  # noqa: F401  (the examples in the docstrings use it)
from torch import Tensor

from invact.inverting.autograd_functions import invert
from invact.kernels import CURVES
from invact.kernels.curves import monotone_families

__all__ = [
    "celu",
    "elu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "invert",
    "leaky_relu",
    "logsigmoid",
    "mish",
    "quick_gelu",
    "relu6",
    "selu",
    "silu",
    "softplus",
    "softsign",
    "squared_relu",
]


# --- curves with two sides ----------------------------------------------------------------------------


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``torch.nn.functional.gelu``, inverted: x Phi(x), or with ``approximate="tanh"`` its approximation.

    Formula: Hendrycks & Gimpel, arXiv 1606.08415. Raises TypeError for a tensor that is not floating, ValueError for
    another `approximate`.

    >>> gelu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.1587,  0.0000,  0.8413])
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(
            f"gelu has no approximate={approximate!r}: torch.nn.functional.gelu knows two. "
            'Pass approximate="none" or approximate="tanh".'
        )
    return invert(input, CURVES["gelu" if approximate == "none" else "gelu_tanh"])


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.silu``, inverted: x sigmoid(x).

    Formula: Elfwing et al., arXiv 1702.03118. Raises TypeError for a tensor that is not floating.

    >>> silu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.2689,  0.0000,  0.7311])
    """
    return invert(input, CURVES["silu"], inplace)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.mish``, inverted: x tanh(softplus(x)).

    Formula: Misra, arXiv 1908.08681. Raises TypeError for a tensor that is not floating.

    >>> mish(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.3034,  0.0000,  0.8651])
    """
    return invert(input, CURVES["mish"], inplace)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.hardswish``, inverted: x relu6(x + 3) / 6.

    Formula: Howard et al., arXiv 1905.02244. Raises TypeError for a tensor that is not floating.

    >>> hardswish(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.3333,  0.0000,  0.6667])
    """
    return invert(input, CURVES["hardswish"], inplace)


def quick_gelu(input: Tensor) -> Tensor:
    """x sigmoid(1.702 x), inverted; in fp32 inside for 16-bit types, and rounded once.

    Formula: Hendrycks & Gimpel, arXiv 1606.08415, as OpenAI's CLIP uses it. Raises TypeError for a tensor that is not
    floating.

    >>> quick_gelu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.1542,  0.0000,  0.8458])
    """
    return invert(input, CURVES["quick_gelu"])


# --- monotone curves ----------------------------------------------------------------------------------


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.elu``, inverted: x, or alpha (exp(x) - 1) below 0, where f' is y + alpha.

    Formula: Clevert et al., arXiv 1511.07289. Below x = -0.7 f' is as exact as y, absolutely and not relatively: y
    loses it where it nears -alpha. Raises ValueError for a negative alpha.

    >>> elu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.6321,  0.0000,  1.0000])
    """
    return invert(input, monotone_families.elu(alpha), inplace)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.celu``, inverted: x, or alpha (exp(x / alpha) - 1) below 0, where f' is y / alpha + 1.

    Formula: Barron, arXiv 1704.07483. Loses what `elu` loses. Raises ValueError for an alpha that is not positive.

    >>> celu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.6321,  0.0000,  1.0000])
    """
    return invert(input, monotone_families.celu(alpha), inplace)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.selu``, inverted: 1.0507 times an ELU with alpha = 1.6733.

    Formula: Klambauer et al., arXiv 1706.02515. Loses what `elu` loses.

    >>> selu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-1.1113,  0.0000,  1.0507])
    """
    return invert(input, CURVES["selu"], inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.leaky_relu``, inverted: x, or negative_slope x below 0. Nothing is lost.

    Formula: Maas et al., 2013. Raises ValueError for a negative `negative_slope`.

    >>> leaky_relu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.0100,  0.0000,  1.0000])
    """
    return invert(input, monotone_families.leaky_relu(negative_slope), inplace)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.hardtanh``, inverted: x, held between two values.

    Formula: Collobert, 2004. Lost where x is a bound as its dtype rounds it: f' is 0 there. Raises ValueError where
    max_val is not larger than min_val.

    >>> hardtanh(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-1.,  0.,  1.])
    """
    return invert(input, monotone_families.hardtanh(min_val, max_val), inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.relu6``, inverted: x, held between 0 and 6. Nothing is lost.

    Formula: Krizhevsky, 2010.

    >>> relu6(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0., 0., 1.])
    """
    return invert(input, CURVES["relu6"], inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.hardsigmoid``, inverted: relu6(x + 3) / 6.

    Formula: Courbariaux et al., arXiv 1511.00363. Lost where y rounds to 1 although x is less than 3: f' is 0 there.

    >>> hardsigmoid(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0.3333, 0.5000, 0.6667])
    """
    return invert(input, CURVES["hardsigmoid"], inplace)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """``torch.nn.functional.softplus``, inverted: log(1 + exp(beta x)) / beta, where f' is 1 - exp(-beta y).

    Formula: Dugas et al., 2000. Nothing is lost. With a threshold below 17 y falls back where it becomes x, and one bit
    per element is kept that tells on which side of that x was. Raises ValueError for a beta that is not positive.

    >>> softplus(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0.3133, 0.6931, 1.3133])
    """
    return invert(input, monotone_families.softplus(beta, threshold))


def logsigmoid(input: Tensor) -> Tensor:
    """``torch.nn.functional.logsigmoid``, inverted: log(sigmoid(x)), where f' is 1 - exp(y). Nothing is lost.

    Formula: the derivative of log(sigmoid(x)) is 1 - sigmoid(x).

    >>> logsigmoid(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-1.3133, -0.6931, -0.3133])
    """
    return invert(input, CURVES["log_sigmoid"])


def softsign(input: Tensor) -> Tensor:
    """``torch.nn.functional.softsign``, inverted: ``x / (1 + |x|)``, where f' is ``(1 - |y|)^2``.

    Formula: Bergstra et al., 2009. From abs(x) = 1 on f' is as exact as y, absolutely and not relatively.

    >>> softsign(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.5000,  0.0000,  0.5000])
    """
    return invert(input, CURVES["softsign"])


def squared_relu(input: Tensor) -> Tensor:
    """relu(x)^2, inverted: f' is 2 sqrt(y).

    Formula: So et al., Primer, arXiv 2109.08668. Lost where the square falls below the least number of the dtype.

    >>> squared_relu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0., 0., 1.])
    """
    return invert(input, CURVES["squared_relu"])
