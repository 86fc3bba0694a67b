"""One whole training step on simulated tensors: forward, loss, backward, optimizer."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from invact import probing
from invact.errors.checks import Inputs
from invact.errors.own_errors import first_line, raised_by_invact, users_call
from invact.fitting.lifetimes import WEIGHT, Lifetimes
from invact.fitting.optimizers import NotSimulatedError, OptimizerLike, held_by
from invact.fitting.step import GRADIENTS, INPUT, Step
from invact.fitting.work import Work
from invact.kernels.imitated import imitated_on
from invact.patchers import as_on_real_tensors
from invact.probing.probe import packs_for_us
from invact.pytorch.backward import engine_call
from invact.pytorch.containers import tree_leaves
from invact.simulation.as_on_gpu import AsOnGpu
from invact.simulation.autocast import autocast_as_set
from invact.simulation.hooks_aside import hooks_standing_aside
from invact.simulation.leftovers import check_no_leftovers, references_to
from invact.simulation.setting import Setting, stand_in
from invact.simulation.simulated_model import ONE_AT_A_TIME, simulated
from invact.simulation.simulated_tensors import Simulation, fake_tensor_log_silent
from invact.simulation.time_limit import TookTooLongError
from invact.swapping.checkpointed import WITH_RUNNING_STATISTICS
from invact.swapping.planned_device import as_on


@contextmanager
def simulated_training(
    model: nn.Module, inputs: Inputs, setting: Setting, optimizer: OptimizerLike, *, accumulating: bool = False
) -> Iterator[TakeStep]:
    """Gives what takes a step of the model, as often as it is called, each time as the model is patched then.

    Backward begins at the model's own loss where its output has one, else at the sum of all that it gives. Afterwards
    all that can be reached from the model is what it was; see `invact.snapshot.snapshot`.

    Args:
        model: on any device or on meta.
        inputs: as `invact.plan` takes them, with labels where the model computes its loss.
        optimizer: a name of `invact.fitting.optimizers.NAMES`, or one of the user's.
        accumulating: gradients of earlier batches are there when the step begins.

    Raises:
        NotSimulatedError: the optimizer can not be simulated; or from the step that does not run.
        TimeoutError: a step takes longer than `invact.probing.TIME_LIMIT`.
    """
    with ONE_AT_A_TIME:
        mode = Simulation(setting)
        at_first = references_to(mode)
        with as_on_real_tensors(inputs), simulated(model, inputs, setting, mode) as simulated_tensors:
            take_step = TakeStep(model, *simulated_tensors, setting, optimizer, accumulating, mode.limited)
            del simulated_tensors
            try:
                yield take_step
            finally:
                take_step.let_go()
        if references_to(mode) > at_first:
            check_no_leftovers(mode)


class TakeStep:
    """Takes a step of a model on simulated weights and inputs; see `simulated_training`."""

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, Tensor],
        inputs: Any,
        setting: Setting,
        optimizer: OptimizerLike,
        accumulating: bool,
        limited: Callable[[float], AbstractContextManager[None]],
    ) -> None:
        self._model, self._weights, self._inputs, self._setting = model, weights, inputs, setting
        self._accumulating, self._limited, self._from_its_loss = accumulating, limited, False
        own = dict(model.named_parameters())
        simulated = {own[name]: w for name, w in weights.items() if isinstance(w, nn.Parameter) and w.requires_grad}
        self._held = held_by(optimizer, simulated, setting.device)

    def __call__(self, *, with_work: bool = False) -> Step:
        """The step, on the model as it is patched now.

        Args:
            with_work: whether to count what forward computes.
        """
        try:
            return self._step(with_work)
        except Exception as error:
            if isinstance(error, (TookTooLongError, NotSimulatedError)) or raised_by_invact(error):
                raise
            raise NotSimulatedError(
                f"A training step of {type(self._model).__name__} can not be simulated, so its peak can not be told: "
                f"{type(error).__name__}: {first_line(error)}. Use invact.patch, which needs the forward alone."
            ) from error

    def let_go(self) -> None:
        """Of the simulated tensors."""
        self._weights, self._inputs = {}, ()
        self._limited = lambda seconds: nullcontext()

    def _trained(self) -> list[nn.Parameter]:
        return [w for w in self._weights.values() if isinstance(w, nn.Parameter) and w.requires_grad]

    def _step(self, with_work: bool) -> Step:
        lifetimes = self._seen()
        work = Work(lifetimes) if with_work else None
        with ExitStack() as stack:
            stack.enter_context(AsOnGpu(self._setting) if self._setting.device.type == "cuda" else nullcontext())
            stack.enter_context(fake_tensor_log_silent())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(hooks_standing_aside(packs_for_us, [0]))
            stack.enter_context(as_on(self._setting.device))
            stack.enter_context(imitated_on(self._setting.device))
            # Backward in this thread on a machine with a GPU as well: what is imitated is so for this thread alone.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(self._limited(probing.TIME_LIMIT))
            calls = stack.enter_context(lifetimes.by_module(self._model))
            stack.enter_context(lifetimes)
            forward_ended, kept = self._forward_and_backward(lifetimes, work or nullcontext())
        allocations = lifetimes.allocations()  # before gradients are let go: the optimizer's step finds them
        trained = self._trained()
        gradients = [n for weight in trained if weight.grad is not None for n in lifetimes.numbers(weight.grad)]
        for weight in trained:
            weight.grad = None
        weights = sum(allocation.nbytes for allocation in allocations if allocation.operator == WEIGHT)
        return Step(
            allocations=allocations,
            forward_ended=forward_ended,
            backward_ended=lifetimes.now,
            gradients=frozenset(gradients),
            kept=kept,
            weights=weights,
            held=self._held,
            calls=calls,
            changed=self._changed(lifetimes),
            from_its_loss=self._from_its_loss,
            work=work,
        )

    def _forward_and_backward(
        self, lifetimes: Lifetimes, in_forward: AbstractContextManager[Any]
    ) -> tuple[int, frozenset[int]]:
        """Both with the simulated weights in place, since what is checkpointed runs again in backward.

        Returns when forward ended, and what was alive then.
        """
        seen: list[tuple[int, frozenset[int]]] = []

        def both() -> None:
            with autocast_as_set(self._setting), in_forward:
                loss = self._loss()
            seen.append((lifetimes.now, frozenset(lifetimes.alive())))
            with lifetimes.backward():
                # Not `loss.backward`: what imitates a GPU would be told of it, and be off while regions run again.
                seed = (torch.ones_like(loss),)
                users_call(engine_call, (loss,), seed, False, False, (), allow_unreachable=True, accumulate_grad=True)

        whole = _Whole(self._model, both)
        weights = {f"model.{name}": weight for name, weight in self._weights.items()}
        in_context_of_its_own = contextvars.copy_context().run
        users_call(in_context_of_its_own, torch.func.functional_call, whole, weights, ())
        return seen[0]

    def _changed(self, lifetimes: Lifetimes) -> dict[int, int]:
        counters = {
            number
            for path, module in self._model.named_modules()
            if isinstance(module, WITH_RUNNING_STATISTICS)
            for name in module._buffers
            if (buffer := self._weights.get(f"{path}.{name}".lstrip("."))) is not None
            for number in lifetimes.numbers(buffer)
        }
        return {number: moment for number, moment in lifetimes.changed.items() if number not in counters}

    def _seen(self) -> Lifetimes:
        """What will follow the step, and knows what is there before."""
        device = stand_in(self._setting.device)
        lifetimes = Lifetimes(device if device.type == "cuda" else None)
        for weight in self._weights.values():
            lifetimes.see(weight, WEIGHT)
        for tensor in tree_leaves(self._inputs):
            if isinstance(tensor, Tensor):
                lifetimes.see(tensor, INPUT)
        if self._accumulating:
            for weight in self._trained():
                weight.grad = torch.empty_like(weight)
                lifetimes.see(weight.grad, GRADIENTS)
        return lifetimes

    def _loss(self) -> Tensor:
        args, kwargs = ((), self._inputs) if isinstance(self._inputs, dict) else (self._inputs, {})
        output = users_call(self._model, *args, **kwargs)
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.requires_grad:
            self._from_its_loss = True
            return loss.sum()
        given = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if not given:
            raise NotSimulatedError(
                f"Nothing that {type(self._model).__name__} gives takes a gradient, so there is no step to take. Let "
                "some of its parameters train: p.requires_grad_()."
            )
        first, *others = given
        return sum((t.sum() for t in others), start=first.sum())


class _Whole(nn.Module):
    """A step of a model as the forward of a module around it."""

    def __init__(self, model: nn.Module, run: Callable[[], None]) -> None:
        super().__init__()
        self.model = model
        self._run = run

    def forward(self) -> None:
        self._run()
