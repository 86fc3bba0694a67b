"""One model, stock against patched: bytes by an independent count, outputs, gradients, and all undone by unpatch."""

from __future__ import annotations

import copy
import gc
import random
import sys
import traceback
import weakref
from dataclasses import dataclass

import numpy
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

import invact
from invact.swapping import inversion

BYTES_WITHIN = 0.01
OUTPUTS_WITHIN = 1e-5
GRADIENTS_WITHIN = 1e-4
SEED = 0
# The usual patch inverts wherever it can, as with large batches on a GPU; the exact one derives.
inversion.SMALLEST_INVERTED, inversion.LARGEST_INVERTED_ON_CPU = 1, sys.maxsize
EXACT = ("relu", "relu6", "leaky_relu", "hardtanh", "hardsigmoid")  # inverted, their gradients are stock's bit for bit


class CannotRunError(Exception):
    """The stock model itself gives nothing to compare."""


class Stock:
    """A model in training mode with its inputs, as it stood before patching.

    Every run starts from the same random states and the same buffers, since batch norm and its kin change theirs.
    """

    def __init__(self, model: nn.Module, inputs):
        self.model = model.train()
        self.inputs = inputs
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def reset(self) -> None:
        torch.manual_seed(SEED)
        random.seed(SEED)
        numpy.random.seed(SEED)
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                if name in self.buffers and buffer.shape == self.buffers[name].shape:
                    buffer.copy_(self.buffers[name])

    def forward(self):
        self.reset()
        return self.model(**self.inputs) if isinstance(self.inputs, dict) else self.model(*self.inputs)

    def run(self) -> Run:
        """One forward and backward for a fixed smooth loss, and what was kept in between."""
        self.model.zero_grad(set_to_none=True)
        with Count(self.model) as count:
            output = self.forward()
        kept = count.nbytes()
        outputs = differentiable(output)
        if not outputs:
            raise CannotRunError("no output needs a gradient")
        sum(smooth_loss(t) for t in outputs).backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not gradients:
            raise CannotRunError("no parameter gets a gradient")
        self.model.zero_grad(set_to_none=True)
        return Run(vector(outputs), vector(gradients), kept)


@dataclass
class Run:
    """All outputs as one vector, all parameters' gradients as one, and the bytes kept for backward."""

    output: torch.Tensor
    gradient: torch.Tensor
    kept: int


class Count:
    """Bytes of the storages that a forward inside it keeps for backward, parameters and buffers left out.

    Written apart from invact's ledger: it hooks no module and tells storages by their address.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._packed: list[weakref.ref[_Packed]] = []
        self._hooks = saved_tensors_hooks(self._pack, lambda box: box.tensor)

    def __enter__(self) -> Count:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> _Packed:
        box = _Packed(tensor.detach())
        self._packed.append(weakref.ref(box))
        return box

    def nbytes(self) -> int:
        gc.collect()  # what belongs to no output's graph can never be run backward
        boxes = filter(None, (reference() for reference in self._packed))
        storages = [part.untyped_storage() for box in boxes for part in _dense(box.tensor)]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        own = {t.untyped_storage().data_ptr() for t in [*self._model.parameters(), *self._model.buffers()]}
        return sum(nbytes for address, nbytes in sizes.items() if address not in own)


class _Packed:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _dense(tensor: torch.Tensor) -> list[torch.Tensor]:
    if tensor.layout is torch.strided:
        return [tensor]
    return [tensor._indices(), tensor._values()] if tensor.layout is torch.sparse_coo else []


def differentiable(output) -> list[torch.Tensor]:
    """The finite parts of the tensors in a model's output that lead back to parameters; no caches, no lone numbers."""
    if isinstance(output, torch.Tensor):
        if not (output.is_floating_point() and output.requires_grad and output.numel() > 1):
            return []  # a lone number, such as CLIP's scale, would outweigh all others
        finite = output.detach().isfinite()
        return [output if finite.all() else output[finite]]
    if isinstance(output, dict):
        output = [value for key, value in output.items() if "cache" not in key and "past" not in key]
    if isinstance(output, (tuple, list)):
        return [t for item in output for t in differentiable(item)]
    return []


def smooth_loss(output: torch.Tensor) -> torch.Tensor:
    """Sees every element of an output, whatever its size, and of normalised features too."""
    scale = output.detach().square().mean().clamp_min(1e-20)
    weights = torch.arange(output.numel(), dtype=output.dtype).cos().view(output.shape)
    return output.square().mean() / scale + (output * weights).mean() / scale.sqrt()


def vector(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().to_dense().flatten() for t in tensors])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    apart, size = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (found - expected, expected))
    return float(apart / size.clamp_min(1e-30))


def awaken(model: nn.Module) -> None:
    """Gives every linear layer an output of unit size for an input of unit size, and layer scales and gates a say.

    Fresh transformers are initialised so small that no activation comes near its minimum, the hard place; and behind
    a head or a branch that begins at zero no gradient comes at all.
    """
    with torch.no_grad():
        for layer in model.modules():
            weight = getattr(layer, "weight", None)
            if _is_matrix(weight):
                fan_in = weight.shape[0] if type(layer).__name__ == "Conv1D" else weight[0].numel()
                gain = float(weight.std()) * fan_in**0.5
                if gain == 0:
                    weight.normal_(std=fan_in**-0.5)
                elif gain < 1 and weight.ndim == 2 and not isinstance(layer, nn.Embedding):
                    weight.div_(gain)
        for name, parameter in model.named_parameters():
            if _is_small_constant(parameter) and not name.endswith("bias"):  # a layer scale, a norm of a branch
                parameter.fill_(0.5)


def _is_matrix(weight) -> bool:
    is_weight = isinstance(weight, nn.Parameter) and weight.is_floating_point()
    return is_weight and weight.ndim >= 2 and weight.numel() > 1


def _is_small_constant(parameter: nn.Parameter) -> bool:
    if not parameter.is_floating_point() or not parameter.numel():
        return False
    low, high = float(parameter.min()), float(parameter.max())
    return low == high and abs(high) < 0.1


@dataclass
class Patched:
    """What one patch said and did, and how many sites `unpatch` gave back after it."""

    report: invact.Report
    run: Run
    restored: int

    @property
    def bytes_after(self) -> int:
        return self.report.bytes_after + self.report.weight_cast_bytes


def patched(stock: Stock, exact: bool) -> Patched:
    stock.reset()
    report = invact.patch(stock.model, stock.inputs, exact=exact)
    try:
        run = stock.run()
    finally:
        restored = invact.unpatch(stock.model)
    return Patched(report, run, restored)


def check(model: nn.Module, inputs, alone: bool | None = None, settled: bool = False) -> dict:
    """What patching `model` did, once as exactly as stock and once as usual, and in `failures` what promise it broke.

    Where invact can not but count one real example, that is what is compared, unless `alone` says whether. A model
    that its first forward changes for good, as it does BigBird's, is compared as `settled`.

    Raises:
        CannotRunError: stock fails, or differs from itself.
    """
    stock = Stock(model, inputs)
    before = first_run(stock)
    try:
        exactly, usual = patched(stock, exact=True), patched(stock, exact=False)
    except Exception:
        check_deterministic(before, stock.run())
        return {"failures": ["it fails once patched, or in planning"], "traceback": traceback.format_exc()}
    if alone is None and any("smallest batch" in note for note in usual.report.notes):
        return check_first_example(model, inputs)
    undone = stock.run()
    if not same(undone, before):
        check_deterministic(undone, stock.run())
        if not settled:
            return check(model, inputs, alone, settled=True)

    report = usual.report
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "sites": len(report.sites),
        "inverted": len(report.inverted),
        "derived": len(report.derived),
        "curves": sorted({site.activation for site in report.sites}),
        "bytes_before": report.bytes_before + report.weight_cast_bytes,
        "bytes_after": usual.bytes_after,
        "bytes_after_exact": exactly.bytes_after,
        # A report's is never above what its plan reaches; of two plans the lower.
        "bytes_floor": min(report.bytes_floor, exactly.report.bytes_floor) + report.weight_cast_bytes,
        "bytes_derived": sum(tensor.bytes_saved for tensor in report.derived),
        "remains": report.remains,
        "not_derived": report.not_derived,
        "kept_before": before.kept,
        "kept_after": usual.run.kept,
        "kept_after_exact": exactly.run.kept,
        "output_error": relative_error(usual.run.output, before.output),
        "gradient_error": relative_error(usual.run.gradient, before.gradient),
        "exact_output_error": relative_error(exactly.run.output, before.output),
        "exact_gradient_error": relative_error(exactly.run.gradient, before.gradient),
        "bitwise_exact": same(exactly.run, before),
        "bitwise": same(usual.run, before),
        "restored": usual.restored,
        "to_restore": len(report.inverted),
        "restored_exact": exactly.restored,
        "bitwise_after_unpatch": same(undone, before),
        "notes": report.notes,
    }
    inexact = [site for site in report.inverted if site.activation.partition("(")[0] not in EXACT]
    if inexact and found["gradient_error"] == 0:
        raise CannotRunError("nothing to compare: no gradient comes through what is inverted")
    if found["gradient_error"] > GRADIENTS_WITHIN:
        found["rounding_error"] = rounding_error(model, inputs, before)
    return {**found, "failures": failures(found)}


def rounding_error(model: nn.Module, inputs, run: Run) -> float:
    """How far stock's own fp32 gradients are from float64: some models amplify every rounding."""
    try:
        exact = Stock(copy.deepcopy(model).double(), tree_map_only(torch.Tensor, _as_double, inputs)).run()
    except Exception:  # it has fp32 written into it
        return 0.0
    return relative_error(run.gradient, exact.gradient)


def _as_double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def check_first_example(model: nn.Module, inputs) -> dict:
    """The bytes of one example, and the gradients of the whole batch.

    Of a single example stock gradients can be wrong: on the CPU, PyTorch 2.6 to 2.14 misread the strides of the
    gradient that SLANet's batch norm is given, since the batch is no dimension to them.
    """
    try:
        found = check(model, first_example(inputs), alone=True)
    except CannotRunError:  # batch norm wants more than one value; then invact counts the whole batch as well
        return check(model, inputs, alone=False)
    if found.get("gradient_error", 0.0) > GRADIENTS_WITHIN:
        whole = check(model, inputs, alone=False)
        errors = ("gradient_error", "rounding_error", "output_error")
        found |= {key: whole[key] for key in errors if key in whole}
        found["failures"] = failures(found)
    return found


def first_run(stock: Stock) -> Run:
    try:
        run = stock.run()
    except CannotRunError:
        raise
    except Exception as error:
        raise CannotRunError(f"{type(error).__name__}: {str(error).strip()[:300]}") from error
    if not run.gradient.isfinite().all():
        raise CannotRunError("its own gradients are not finite")
    return run


def same(one: Run, other: Run) -> bool:
    return torch.equal(one.output, other.output) and torch.equal(one.gradient, other.gradient)


def check_deterministic(one: Run, other: Run) -> None:
    """Raises CannotRunError if two runs of stock differ."""
    if not same(one, other):
        apart = relative_error(one.gradient, other.gradient)
        raise CannotRunError(f"it is not deterministic: gradients {apart:.1e} apart")


def failures(found: dict) -> list[str]:
    """Which promises a patched model broke, each with its figure."""
    broken = []
    for when in ("before", "after", "after_exact"):
        said, counted = found[f"bytes_{when}"], found[f"kept_{when}"]
        if abs(said - counted) > BYTES_WITHIN * max(counted, 1):
            broken.append(f"bytes {when}: {said} said, {counted} counted ({said / max(counted, 1) - 1:+.1%})")
        if counted > found["kept_before"]:
            broken.append(f"{when}: it costs {counted - found['kept_before']} bytes")
    if not found["bitwise_exact"]:
        off = f"outputs are {found['exact_output_error']:.1e} and gradients {found['exact_gradient_error']:.1e} off"
        broken.append(f"exact: {off}")
    if not found["inverted"] and not found["bitwise"]:
        broken.append("nothing is inverted, and outputs or gradients are not bit for bit the old ones")
    if not found["output_error"] <= OUTPUTS_WITHIN:
        broken.append(f"outputs are {found['output_error']:.1e} off")
    if not found["gradient_error"] <= max(GRADIENTS_WITHIN, 3 * found.get("rounding_error", 0.0)):
        broken.append(f"gradients are {found['gradient_error']:.1e} off")
    if found["restored"] != found["to_restore"]:
        broken.append(f"{found['restored']} sites restored of {found['to_restore']}")
    if found["restored_exact"]:
        broken.append(f"{found['restored_exact']} sites restored of none")
    if not found["bitwise_after_unpatch"]:
        broken.append("unpatch does not give back bitwise the same")
    return broken


def first_example(inputs):
    """The first example of a batch, as invact cuts it where it has to run the model for real."""
    values = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    batch = next(len(value) for value in values if isinstance(value, torch.Tensor))

    def cut(value):
        return value[:1] if isinstance(value, torch.Tensor) and value.dim() and len(value) == batch else value

    return {name: cut(value) for name, value in inputs.items()} if isinstance(inputs, dict) else tuple(map(cut, inputs))
