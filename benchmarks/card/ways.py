"""Ways to take a training step with one model: each is entered, steps are taken, and it is left as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from invact.bench_steps import loss_of
from invact.checkpointing import checkpointed
from invact.planning import Decided
from invact.timing import wait_for, wall_seconds

STOCK, INVACT, CHECKPOINTING, SELECTIVE = "stock", "invact", "checkpointing", "selective"
COMPILE, COMPILE_INVACT = "compile", "compile+invact"

# What selective checkpointing keeps: everything that multiplies matrices. The rest is made again in backward.
_PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
_KEPT = [getattr(torch.ops.aten, name).default for name in _PRODUCTS if hasattr(torch.ops.aten, name)]
_ARGUMENTS = {operator: [argument.name for argument in operator._schema.arguments] for operator in _KEPT}


def eager_ways(model: nn.Module, decided: Decided) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """By name, what makes the model take its steps in that way for the length of a block; stock first."""
    return {
        STOCK: nullcontext,
        INVACT: partial(inverted, model, decided),
        CHECKPOINTING: partial(checkpointed, model),
        SELECTIVE: partial(selectively_checkpointed, model),
    }


@contextmanager
def inverted(model: nn.Module, decided: Decided) -> Iterator[None]:
    swaps = decided.apply(model)
    try:
        yield
    finally:
        swaps.undo()


@contextmanager
def selectively_checkpointed(model: nn.Module) -> Iterator[None]:
    """Every repeated block keeps its matrix products, and makes the rest of its tensors again."""
    contexts = partial(create_selective_checkpoint_contexts, _kept)
    blocks = repeated_blocks(model)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _kept(_: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    """Products, but no attention that drops out: where it is kept it draws no random numbers when the rest is made
    again, and whatever drops out after it would then draw others than in the forward pass."""
    names = _ARGUMENTS.get(operator)
    if names is None:
        return CheckpointPolicy.PREFER_RECOMPUTE
    if "dropout_p" in names:
        values = dict(zip(names, arguments, strict=False)) | named
        if values.get("dropout_p", 0.0) > 0:
            return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a network: the modules of the class that most often makes up a whole list by itself."""
    rows = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(child) for child in module}) == 1
    ]
    counts = Counter(type(block) for row in rows for block in row if not isinstance(block, nn.Sequential))
    (most_often, _), *_ = counts.most_common(1)
    return [block for row in rows for block in row if type(block) is most_often]


class Stepper:
    """Takes steps with a model, forward, loss and backward, and knows how much memory the last one took."""

    def __init__(self, forward: Callable[..., Any], model: nn.Module, inputs: Any) -> None:
        self.forward, self.model, self.inputs = forward, model, inputs
        self.device = next(model.parameters()).device
        self.peak_bytes = 0

    def seconds(self, way: Callable[[], AbstractContextManager[object]] = nullcontext) -> float:
        """One step, the entering of the way not counted."""
        with way():
            return wall_seconds(lambda _: self._step(), self._before, self.device)

    def gradients(self, way: Callable[[], AbstractContextManager[object]] = nullcontext) -> list[Tensor | None]:
        with way():
            self._before()
            self.loss().backward()
        found = [p.grad for p in self.model.parameters()]
        self.model.zero_grad()
        return found

    def loss(self) -> Tensor:
        inputs = self.inputs
        return loss_of(self.forward(**inputs) if isinstance(inputs, dict) else self.forward(*inputs))

    def _before(self) -> None:
        torch.manual_seed(0)
        if self.device.type == "cuda":
            wait_for(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._allocated = torch.cuda.memory_allocated(self.device)

    def _step(self) -> None:
        self.loss().backward()
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._allocated
        self.model.zero_grad()


def difference(found: list[Tensor | None], expected: list[Tensor | None]) -> dict[str, float]:
    """Relative difference of all gradients as one vector, and the largest of one parameter's."""
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    off = torch.stack([(a - b).norm() for a, b in pairs]).cpu()
    size = torch.stack([b.norm() for _, b in pairs]).cpu()
    # A parameter whose gradient is nothing but rounding, as a key's bias, has no relative error to speak of.
    tells = size > 1e-3 * size.max()
    return {
        "whole": float(off.norm() / size.norm()),
        "largest": float((off / size)[tells].max()),
    }
