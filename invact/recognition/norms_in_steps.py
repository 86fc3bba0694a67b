"""RMS norms that a model writes out in steps, told from what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from invact.recognition.bare_copies import RaisedError, bare_copy, output_of, state_of
from invact.recognition.dependencies import UnseenError
from invact.recognition.dependencies_of_modules import dependencies_of_module
from invact.recognition.fused_rms_norm import Fusion, RmsNorm

_TOLERANCE = 5e-6  # of what is worked out in fp32, element by element: ten times its own error


_SLOPE_TOLERANCE = 1e-5  # of gradients, which add up


_SMALLEST_EPS = 1e-12  # of less nothing is seen in fp32


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
            dependencies = dependencies_of_module(module)
        except UnseenError:
            continue
        width = module.get_parameter(weight).shape[0]
        key = (type(module), dependencies, weight, width)
        if key not in known:
            known[key] = recognise_norm(module)
        norm = known[key]
        if norm is not None:
            replaced = "forward" in vars(module)
            yield FoundNorm(path, type(module).__name__, Fusion(norm, dependencies), module, replaced)


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
        bare, weight = with_known_weight(module, name, torch.float32)
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


def _only_parameter(module: nn.Module) -> str | None:
    """The name of the one vector that a leaf has."""
    if next(module.children(), None) is not None or next(module.buffers(recurse=False), None) is not None:
        return None
    named = list(module.named_parameters(recurse=False))
    alone = len(named) == 1 and len([each for each in module._parameters.values() if each is not None]) == 1
    return named[0][0] if alone and named[0][1].dim() == 1 and named[0][1].numel() > 1 else None


def with_known_weight(module: nn.Module, name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A copy whose parameter has values of both signs and many sizes, none of them near 0 or -1."""
    bare, shape = bare_copy(module), module.get_parameter(name).shape
    signs = 1 - 2 * (torch.arange(shape[0]) % 2)
    weight = signs * (1.2 + (1.5 * normal_numbers(shape, seed=0)).exp())
    bare.__dict__["_parameters"] = dict.fromkeys(bare._parameters) | {name: nn.Parameter(weight.to(dtype))}
    return bare, bare.get_parameter(name)


def normal_numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def _grids(width: int) -> list[Tensor]:
    """Of several sizes, ranks and means, with which an RMS norm is no layer norm, and with a few numbers far out."""
    x = normal_numbers((4, 15, width), seed=1)
    sizes = [1e-6 * x, 1e-3 * x, x, 1e3 * x, 1e6 * x]
    return [*sizes, x + 2, x.sort(-1).values - 5, x.pow(3), x[:, 0], x[:, :1], x.view(2, 2, 3, 5, width)[:, 0]]


def _with_nan(width: int) -> Tensor:
    x = normal_numbers((4, 15, width), seed=1)
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
    bare, weight = with_known_weight(module, norm.weight, dtype)
    return _agrees(
        norm, bare, weight, normal_numbers((4, 15, weight.numel()), seed=1).to(dtype), 4 * torch.finfo(dtype).eps
    )


def _has_gradients_of(norm: RmsNorm, bare: nn.Module, weight: Tensor, training: bool) -> bool:
    def tried(compute: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The output and both gradients, with gradients wanted."""
        x = normal_numbers((4, 15, weight.numel()), seed=1).to(dtype).requires_grad_()
        y = compute(x)
        gradients = torch.autograd.grad(y, (x, weight), normal_numbers(tuple(x.shape), seed=2).to(dtype))
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
