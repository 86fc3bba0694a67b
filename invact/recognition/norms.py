"""RMS norms that a model writes out in steps, told from what they compute, and run by PyTorch's fused operator instead.

Written out, as in Llama, T5 and Gemma, a norm goes over its tensor some ten times forward and more often backward, most
of that in 32 bits. `torch.nn.functional.rms_norm` is one kernel on a GPU: it reads and writes the tensor once, works in
32 bits and rounds once: as near to the true value as the steps or nearer, and not what they give in every bit.

Formula: y = w x / sqrt(mean(x^2) + eps), Zhang & Sennrich, arXiv 1910.07467.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from invact.pytorch.circumstances import transforms_active
from invact.pytorch.containers import tree_leaves
from invact.pytorch.modes import TorchDispatchMode
from invact.pytorch.operators import has_fused_rms_norm
from invact.pytorch.tensors import is_traceable_wrapper_subclass
from invact.recognition.bare_copies import RaisedError, bare_copy, output_of, state_of
from invact.recognition.curves import Rounding
from invact.recognition.settings import Settings, UnseenError, settings_of_module

_TOLERANCE = 5e-6  # of what is worked out in fp32, element by element: ten times its own error
_SLOPE_TOLERANCE = 1e-5  # of gradients, which add up
_SMALLEST_EPS = 1e-12  # of less nothing is seen in fp32
_RANKS = (2, 3, 4)  # of tensors that a norm is tried with
_ACCESSES = 7
"""Of each element by the fused operator: x and y forward; x and dy, each for dx and for dw, and dx backward."""


@dataclass(frozen=True)
class RmsNorm:
    """An RMS norm over the last dimension.

    Attributes:
        weight: the name of the module's parameter.
        eps: is added to the mean square.
        offset: is added to the weight: 0, or 1 as in Gemma.
    """

    weight: str
    eps: float
    offset: int = 0

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm of x, of (..., width), by the fused operator, in x's dtype and rounded once.

        `weight` is of (width,) and, without an offset, of x's dtype.
        """
        shape = weight.shape
        if not self.offset:
            return F.rms_norm(x, shape, weight, self.eps)
        # In 16 bits 1 + w would lose most digits of a small w.
        return F.rms_norm(x.float(), shape, self.offset + weight.float(), self.eps).to(x.dtype)

    def accesses(self, dtype: torch.dtype) -> int:
        """Bytes read and written for each element, forward and backward."""
        if self.offset and dtype.itemsize == 2:
            return 4 * _ACCESSES + 4 * (4 + 2)  # casts of x, y and their gradients
        return dtype.itemsize * _ACCESSES

    def in_float64(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same by the formula, worked out and given in fp64."""
        x, weight = x.double(), weight.double()
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.offset + weight)


@dataclass(frozen=True)
class Fusion:
    """How a norm is run by the fused operator.

    Attributes:
        norm: what is computed there.
        settings: what the module's code reads besides its input. While it is anything else, the stock code runs.
    """

    norm: RmsNorm
    settings: Settings

    def applies(self, module: nn.Module, x: Any, device: torch.device) -> bool:
        """Whether `x`, which lies on `device` or is planned to, is to be normed here and not by the stock code."""
        if not isinstance(x, Tensor) or not has_fused_rms_norm(device) or x.layout is not torch.strided or x.is_nested:
            return False
        if x.dim() not in _RANKS or not x.is_contiguous():
            return False  # not looked at; and the fused operator does not give the steps' strides
        weight = getattr(module, self.norm.weight, None)
        if not isinstance(weight, Tensor) or weight.dtype is not x.dtype or x.shape[-1:] != weight.shape:
            return False  # of two dtypes: what stock gives has the wider one
        if x.dtype.itemsize > 4 or weight.device != x.device or torch.compiler.is_compiling() or transforms_active():
            return False
        if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
            return False
        if x.dtype.itemsize == 2 and torch.is_autocast_enabled(x.device.type):
            return False  # which has rules of its own for the fused operator
        plain = not any(type(each) is not Tensor and is_traceable_wrapper_subclass(each) for each in (x, weight))
        return plain and self.settings.unchanged(module)

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        return self.norm(x, getattr(module, self.norm.weight))


@dataclass(frozen=True)
class FoundNorm:
    """A module that computes an RMS norm in steps.

    Attributes:
        path: of the module.
        label: its class name.
        fusion: how it can be run by the fused operator.
        computes: the module.
        replaced: whether somebody has put another forward on this one module.
    """

    path: str
    label: str
    fusion: Fusion
    computes: nn.Module
    replaced: bool
    written: None = None  # unlike an activation, it is only looked for as a module


def walk_norms(modules: Iterator[tuple[str, nn.Module]]) -> Iterator[FoundNorm]:
    """The RMS norms written out in steps, in the order of the modules.

    Example:
        >>> from transformers.models.llama.modeling_llama import LlamaRMSNorm
        >>> model = nn.Sequential(nn.Linear(8, 8), LlamaRMSNorm(8), nn.RMSNorm(8))
        >>> [norm.path for norm in walk_norms(model.named_modules())]
        ['1']
    """
    known: dict[tuple[Any, ...], RmsNorm | None] = {}
    for path, module in modules:
        weight = _only_parameter(module)
        if weight is None:
            continue
        try:
            settings = settings_of_module(module)
        except UnseenError:
            continue
        width = module.get_parameter(weight).shape[0]
        key = (type(module), settings, weight, width)
        if key not in known:
            known[key] = recognise_norm(module)
        norm = known[key]
        if norm is not None:
            replaced = "forward" in vars(module)
            yield FoundNorm(path, type(module).__name__, Fusion(norm, settings), module, replaced)


def recognise_norm(module: nn.Module) -> RmsNorm | None:
    """The RMS norm that `module` computes in steps, or None: it computes something else, or by the fused operator.

    A leaf with one vector as its parameter is evaluated on the CPU, as a copy with other weights, in training and in
    evaluation mode, on tensors of two to four dimensions, in fp32, bf16 and fp16: its values and gradients must be
    those of the formula, and nothing about it may have changed.

    Example:
        >>> from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
        >>> recognise_norm(GemmaRMSNorm(64, eps=1e-6))
        RmsNorm(weight='weight', eps=1e-06, offset=1)
        >>> recognise_norm(nn.LayerNorm(64, bias=False)) is None
        True
    """
    name = _only_parameter(module)
    if name is None:
        return None
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        bare, weight = _with_known_weight(module, name, torch.float32)
        state = state_of(bare)
        try:
            with torch.no_grad():
                norm = _guess(bare, name, weight)
                if norm is None or _is_fused(bare, weight):
                    return None
                found = all(
                    _agrees(norm, bare, weight, x) for x in (*_grids(weight.numel()), _with_nan(weight.numel()))
                )
                found = found and all(_agrees_in(dtype, norm, module) for dtype in (torch.bfloat16, torch.float16))
            found = found and all(_has_gradients_of(norm, bare, weight, training) for training in (True, False))
        except RaisedError:
            return None
        return norm if found and state is not None and state_of(bare) == state else None


def own_rounding_of(found: FoundNorm, dtype: torch.dtype) -> Rounding:
    """How the module's own steps in 16 bits and the norm rounded once differ from float64, over x ~ N(0, 1)."""
    with torch.no_grad(), torch.device("cpu"):
        bare, weight = _with_known_weight(found.computes, found.fusion.norm.weight, dtype)
        x = _normal((4, 15, weight.numel()), seed=1).to(dtype)
        exact = found.fusion.norm.in_float64(x, weight)
        steps, once = output_of(bare, x.clone()), exact.to(dtype)
    own_error, once_error = (((y.double() - exact).norm() / exact.norm()).item() for y in (steps, once))
    return Rounding(own_error, once_error)


def accesses_in_steps(found: FoundNorm, dtype: torch.dtype) -> float:
    """Bytes that the module's own operators read and write for each element, forward and backward."""
    with torch.enable_grad(), torch.device("cpu"):
        bare, weight = _with_known_weight(found.computes, found.fusion.norm.weight, dtype)
        x = _normal((4, 15, weight.numel()), seed=1).to(dtype).requires_grad_()
        with _Accesses() as accesses:
            y = output_of(bare, x)
            y.backward(torch.ones_like(y))
    nbytes: float = accesses.nbytes / x.numel()
    return nbytes


class _Accesses(TorchDispatchMode):
    """Bytes that operators read and write, views left out."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func not in _MOVE_NOTHING:
            tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
            self.nbytes += sum(each.untyped_storage().nbytes() for each in tensors)
        return out


_MOVE_NOTHING = (torch.ops.aten.detach.default, torch.ops.aten.ones_like.default)


# --- the module, tried --------------------------------------------------------------------------------


def _only_parameter(module: nn.Module) -> str | None:
    """The name of the one vector that a leaf has."""
    if next(module.children(), None) is not None or next(module.buffers(recurse=False), None) is not None:
        return None
    named = list(module.named_parameters(recurse=False))
    alone = len(named) == 1 and len([each for each in module._parameters.values() if each is not None]) == 1
    return named[0][0] if alone and named[0][1].dim() == 1 and named[0][1].numel() > 1 else None


def _with_known_weight(module: nn.Module, name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A copy whose parameter has values of both signs and many sizes, none of them near 0 or -1."""
    bare, shape = bare_copy(module), module.get_parameter(name).shape
    signs = 1 - 2 * (torch.arange(shape[0]) % 2)
    weight = signs * (1.2 + (1.5 * _normal(shape, seed=0)).exp())
    bare.__dict__["_parameters"] = dict.fromkeys(bare._parameters) | {name: nn.Parameter(weight.to(dtype))}
    return bare, bare.get_parameter(name)


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def _grids(width: int) -> list[Tensor]:
    """Of several sizes, ranks and means, with which an RMS norm is no layer norm, and with a few numbers far out."""
    x = _normal((4, 15, width), seed=1)
    sizes = [1e-6 * x, 1e-3 * x, x, 1e3 * x, 1e6 * x]
    return [*sizes, x + 2, x.sort(-1).values - 5, x.pow(3), x[:, 0], x[:, :1], x.view(2, 2, 3, 5, width)[:, 0]]


def _with_nan(width: int) -> Tensor:
    x = _normal((4, 15, width), seed=1)
    x[2, 3, 5 % width] = torch.nan
    return x


def _guess(bare: nn.Module, name: str, weight: Tensor) -> RmsNorm | None:
    """From what it does to large numbers, where eps is nothing, and then to small ones, where it is all."""
    ones = torch.ones(4, 15, weight.numel())
    large, small = _output(bare, 1e4 * ones), _output(bare, 1e-4 * ones)
    if large is None or small is None:
        return None
    for offset in (0, 1):
        if torch.allclose(large, (offset + weight).expand_as(large), rtol=_TOLERANCE):
            ratio = (small / (1e-4 * (offset + weight))).double().mean().item()  # 1 / sqrt(1e-8 + eps)
            eps = ratio**-2 - 1e-8 if ratio > 0 else 0.0
            if eps >= _SMALLEST_EPS:
                return RmsNorm(name, _as_written(bare, eps), offset)
    return None


def _as_written(module: nn.Module, eps: float) -> float:
    """The number that the module has, where it has one like that: what was measured has few digits."""
    written = [value for value in vars(module).values() if type(value) is float]
    return next((value for value in written if abs(value - eps) <= 1e-3 * eps), eps)


def _output(bare: nn.Module, x: Tensor, *, training: bool = True) -> Tensor | None:
    y = output_of(bare, x.clone(), training=training)
    return y if isinstance(y, Tensor) and y.shape == x.shape and y.dtype is x.dtype else None


def _agrees(norm: RmsNorm, bare: nn.Module, weight: Tensor, x: Tensor, tolerance: float = _TOLERANCE) -> bool:
    """Element by element: each is one number times what is the same along its row."""
    expected, smallest = norm.in_float64(x, weight), torch.finfo(x.dtype).tiny  # of less the last digits are gone
    given = (_output(bare, x), _output(bare, x, training=False))
    return all(
        y is not None and torch.allclose(y.double(), expected, rtol=tolerance, atol=smallest, equal_nan=True)
        for y in given
    )


def _agrees_in(dtype: torch.dtype, norm: RmsNorm, module: nn.Module) -> bool:
    """Whether it is the same norm in 16 bits, as far as a rounding at every step lets that be seen."""
    bare, weight = _with_known_weight(module, norm.weight, dtype)
    return _agrees(norm, bare, weight, _normal((4, 15, weight.numel()), seed=1).to(dtype), 4 * torch.finfo(dtype).eps)


def _has_gradients_of(norm: RmsNorm, bare: nn.Module, weight: Tensor, training: bool) -> bool:
    def tried(compute: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The output and both gradients, with gradients wanted."""
        x = _normal((4, 15, weight.numel()), seed=1).to(dtype).requires_grad_()
        y = compute(x)
        gradients = torch.autograd.grad(y, (x, weight), _normal(tuple(x.shape), seed=2).to(dtype))
        return [each.detach().double() for each in (y, *gradients)]

    with torch.enable_grad():
        try:
            own = tried(lambda x: output_of(bare, x, training=training), torch.float32)
        except RuntimeError:  # it passes no gradient on
            return False
        true = tried(lambda x: norm.in_float64(x, weight), torch.float64)
    pairs = zip(own, true, strict=True)
    return all((a - b).abs().max() <= _SLOPE_TOLERANCE * b.abs().max() for a, b in pairs)


def _is_fused(bare: nn.Module, weight: Tensor) -> bool:
    """Whether it calls the fused operator itself."""
    with _Calls() as calls, torch.no_grad():
        output_of(bare, torch.ones(4, 15, weight.numel()))
    return not calls.seen.isdisjoint((F.rms_norm, torch.rms_norm))


class _Calls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func)
        return func(*args, **(kwargs or {}))
