"""One forward pass of a model under the ledger, on fake tensors where possible, that leaves no trace."""

from __future__ import annotations

import contextvars
import types
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from invact import probing
from invact.deriving.hooks import Deriving
from invact.deriving.journal import Journal
from invact.errors.checks import Inputs
from invact.errors.own_errors import raised_by_invact, users_call
from invact.ledger.computed import Computed
from invact.ledger.ledger import Ledger
from invact.ledger.own_loss import own_loss
from invact.patchers import as_on_real_tensors
from invact.probing.recording import OpenCall, recorded
from invact.probing.records import Observation, Stock
from invact.pytorch.containers import tree_map_only
from invact.recognition.found_site import Found
from invact.recognition.norms_in_steps import FoundNorm
from invact.simulation.as_on_gpu import AsOnGpu
from invact.simulation.autocast import autocast_as_set
from invact.simulation.checkpointed_regions import checkpoints_counted
from invact.simulation.hooks_aside import hooks_standing_aside
from invact.simulation.leftovers import check_no_leftovers, references_to
from invact.simulation.setting import Setting, stand_in
from invact.simulation.simulated_model import ONE_AT_A_TIME, simulated, weights_of
from invact.simulation.simulated_tensors import Simulation, fake_tensor_log_silent
from invact.simulation.time_limit import TimeLimit, TookTooLongError
from invact.snapshot.snapshot import as_it_was

_NO_HOOKS: Mapping[str, bool] = types.MappingProxyType({})


def observe(
    model: nn.Module,
    inputs: Inputs,
    setting: Setting,
    *,
    watch: Sequence[Found | FoundNorm] = (),
    run_checkpoints: bool = True,
    record_operators: bool = False,
    record_derived: bool = False,
    hooks_at: Mapping[str, bool] = _NO_HOOKS,
) -> Observation:
    """Runs `model` forward once, in the mode in which it is, and reports what autograd kept.

    The pass runs on fake tensors. Where the model cannot (it branches on values, say) one real pass at the
    smallest batch takes its place, with a note. Whatever can be reached from the model is afterwards what it was;
    see `invact.snapshot.snapshot`.

    Args:
        watch: the sites and norms whose calls are to be recorded.
        run_checkpoints: False runs checkpointed regions as if they were not.
        record_operators: whether to record what made what, for the floor.
        record_derived: whether to record what is derived, of a model in which hooks are set for that.
        hooks_at: where hooks are to be set for the length of the pass; see `invact.deriving.hooked_modules`.

    Raises:
        TimeoutError: a forward pass takes longer than `invact.probing.TIME_LIMIT`.
        LeftoverError: something holds on to simulated tensors.
        Exception: the model's own, if it fails in its forward with these inputs on real tensors as well.
    """
    probe = _Probe(
        model,
        inputs,
        setting,
        watch=watch,
        run_checkpoints=run_checkpoints,
        record_operators=record_operators,
        record_derived=record_derived,
        hooks_at=hooks_at,
    )
    with ONE_AT_A_TIME:
        mode = Simulation(setting)
        at_first = references_to(mode)
        found = probe.on_simulated_tensors(mode)
        if isinstance(found, str):
            why, found = found, probe.on_real_tensors()
            found.notes.append(
                f"counted in one real forward pass at the smallest batch, since the model does not run on fake tensors "
                f"({why})"
            )
        if references_to(mode) > at_first:
            check_no_leftovers(mode)
        return found


@dataclass(frozen=True)
class _Probe:
    """One forward pass of a model; the arguments are those of `observe`."""

    model: nn.Module
    inputs: Inputs
    setting: Setting
    watch: Sequence[Found | FoundNorm]
    run_checkpoints: bool
    record_operators: bool
    record_derived: bool
    hooks_at: Mapping[str, bool]

    def on_simulated_tensors(self, mode: Simulation) -> Observation | str:
        """What was kept, or why the model does not run so."""
        device = stand_in(self.setting.device)
        try:
            with (
                as_on_real_tensors(self.inputs),
                simulated(self.model, self.inputs, self.setting, mode) as (weights, inputs),
            ):
                as_on_gpu = AsOnGpu(self.setting) if self.setting.device.type == "cuda" else nullcontext()
                with as_on_gpu, fake_tensor_log_silent():
                    found = self._run(weights, inputs, mode.limited(probing.TIME_LIMIT))
        except Exception as error:
            if _ends_the_probe(error):
                raise
            if any(p.is_meta for p in self.model.parameters()):  # there are no numbers to run it on
                raise _with_inputs_named(error, self.inputs) from None
            return f"{type(error).__name__}: {str(error).strip()[:120]}"
        if device.type != self.setting.device.type and self.setting.autocast is not None:
            found.notes.append(
                "this PyTorch cannot imitate a GPU where there is none, so autocast followed the rules of the CPU, "
                "which leave more operations in low precision; PyTorch 2.15 can"
            )
        return found

    def on_real_tensors(self) -> Observation:
        """What was kept by the first example alone, or by all where the model does not run on one."""
        try:
            return self._run_real(_smallest_batch(self.inputs))
        except Exception as error:  # batch norm wants more than one value, some models fixed batches
            if _ends_the_probe(error):
                raise
        try:
            return self._run_real(self.inputs)
        except Exception as error:
            if _ends_the_probe(error):
                raise
            raise _with_inputs_named(error, self.inputs) from None

    def _run_real(self, inputs: Inputs) -> Observation:
        with as_it_was(self.model, self.inputs, tensors=True):
            return self._run(weights_of(self.model), inputs, TimeLimit(probing.TIME_LIMIT))

    def _run(self, weights: dict[str, Tensor], inputs: Any, time_limit: AbstractContextManager[Any]) -> Observation:
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        calls: list[OpenCall] = []
        checkpoints, without_hooks = [0], [0]
        ledger = Ledger(self.model, weights.values())
        computed = Computed(weights.values()) if self.record_operators else None
        journal = Journal(ledger) if self.record_derived else None
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # the ledger sees no compiled operation
            stack.enter_context(checkpoints_counted(checkpoints, run_them=self.run_checkpoints))
            stack.enter_context(hooks_standing_aside(packs_for_us, without_hooks))
            stack.enter_context(autocast_as_set(self.setting))
            stack.enter_context(recorded(self.model, self.watch, ledger, calls, self.hooks_at))
            stack.enter_context(time_limit)
            with computed or nullcontext(), ledger, journal.open() if journal else nullcontext():
                # In a context of its own: what forward sets context variables to ends with it.
                call = contextvars.copy_context().run
                output = users_call(call, torch.func.functional_call, self.model, weights, args, kwargs)
            entries = ledger.entries()
            found = Observation(
                entries=entries,
                memory=ledger.memory(),
                calls=[call.closed() for call in calls],
                labels={entry.path: ledger.label(entry.path) for entry in entries},
                checkpoints=checkpoints[0],
                without_hooks=without_hooks[0],
                computed=computed,
                loss=own_loss(output),
            )
            if journal is not None:
                _add_derived(found, ledger, journal)
            if ledger.of_other_threads:
                path = min(ledger.of_other_threads)
                found.notes.append(f"{path!r} runs in another thread: what is kept there is not counted.")
            del output
        return found


def _add_derived(found: Observation, ledger: Ledger, journal: Journal) -> None:
    """Adds what the same pass would have kept without deriving, and what became of that."""
    stock = journal.stock_entries()
    found.stock = Stock(stock, ledger.memory(stock))
    found.labels |= {entry.path: ledger.label(entry.path) for entry in stock}
    found.derived, found.why_kept, found.read = journal.derived(), journal.why_kept(), journal.read()


def packs_for_us(pack: Any) -> bool:
    """Whether a hook on kept tensors is one of the ledger's or of deriving's, by the function that packs."""
    return isinstance(getattr(pack, "__self__", None), Ledger | Deriving)


def _ends_the_probe(error: Exception) -> bool:
    """Whether to run the model in another way would not help: a fault of ours, out of time, out of memory."""
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    return out_of_memory or isinstance(error, TookTooLongError) or raised_by_invact(error)


def _with_inputs_named(error: Exception, inputs: Inputs) -> Exception:
    """The model's own error, told with what the model was given (before Python 3.11, the error alone)."""
    if hasattr(error, "add_note"):
        given = tree_map_only(Tensor, lambda t: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}", inputs)
        error.add_note(
            f"invact ran the model's forward on example inputs {given} to see what it keeps for backward, and the "
            "forward failed; what it had changed was put back. Pass example_inputs with which the model runs."
        )
    return error


def _smallest_batch(inputs: Any) -> Any:
    """The first example alone, of every tensor that has the batch as its first dimension."""
    sizes: list[int] = []
    tree_map_only(Tensor, lambda tensor: sizes.append(tensor.shape[0] if tensor.dim() else 0), inputs)
    batch = sizes[0] if sizes else 0
    return tree_map_only(
        Tensor, lambda tensor: tensor[:1] if tensor.dim() and tensor.shape[0] == batch else tensor, inputs
    )
