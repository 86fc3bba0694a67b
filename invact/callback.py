"""`InvActCallback` for Hugging Face's transformers.Trainer: patched before the first step, put back after the last."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from invact.during_training import PatchedDuringTraining, peak_figures
from invact.errors.checks import Inputs

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.utils import logging
except ImportError as error:
    raise ImportError(
        "invact.InvActCallback is for transformers.Trainer, but transformers can not be imported. "
        "Install it: pip install 'invact[transformers]'"
    ) from error

logger = logging.get_logger("transformers.invact")


class InvActCallback(PatchedDuringTraining, TrainerCallback):
    """Trains with inverted activations: add it to the callbacks of a `transformers.Trainer`.

    The plan is made when the model is first called in training, from that very batch and under the precision of
    the Trainer, so neither the data nor the random numbers of the run change. The model is put back when
    training ends, also by an error or Ctrl-C. Checkpoints are those of the stock model. Evaluation runs the
    stock modules. As long as one of these callbacks lives, `Trainer.train` is wrapped, by which an error is noticed; a
    Trainer without one is passed straight through.

    One line at level INFO (`TrainingArguments(log_level="info")`) says what was done and which peak is predicted for a
    step with the Trainer's optimizer, and on a GPU a second one at the end what the peak was; the plan itself stays in
    `report`. The first training log carries `invact/sites`, `invact/bytes_before`, `invact/bytes_after`,
    `invact/bytes_saved`, `invact/saving` and `invact/predicted_peak_bytes`; on a GPU every training log carries
    `invact/peak_memory_bytes`.

    Args:
        include: glob patterns over paths; only these sites may be inverted, and only inside these modules is derived.
        exclude: glob patterns over paths; these sites are kept, and inside these modules nothing is derived.
        exact: nothing is inverted, activations are derived instead, and the gradients are bit for bit the stock ones.
        few_bits: 1 to 4 bits per element, and approximate gradients, where neither inverting nor deriving pays.
        memory: as "24GiB": where inverting and deriving do not do, the fewest blocks are checkpointed with which a step
            fits; see `invact.fit`. None: nothing is checkpointed.

    Raises:
        Exception: what `invact.patch` raises or, with `memory`, `invact.fit`, from `trainer.train()`.

    Example:
        >>> callback = InvActCallback(exclude="lm_head.*")
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> print(callback.report)  # doctest: +SKIP
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> InvActCallback:
        callback = super().__new__(cls)
        _train.while_living(callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin()  # again and without an end where auto_find_batch_size tries a smaller batch
        log_plan = logger.info if state.is_world_process_zero else logger.debug
        accumulating = args.gradient_accumulation_steps > 1
        hook = functools.partial(
            self._patch_at_first_batch, _autocast_dtype(args), kwargs.get("optimizer"), accumulating, log_plan
        )
        hook = torch.compiler.disable(hook)  # under torch.compile it is not to be compiled into the model
        self._undo.callback(kwargs["model"].register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _patch_at_first_batch(
        self,
        autocast: torch.dtype | None,
        optimizer: Any,
        accumulating: bool,
        log_plan: Callable[[str], None],
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return  # evaluation before the first step
        self._put_back()  # takes this hook out
        inputs = _inputs(model, args, kwargs)
        report = self._patch(model, inputs, autocast, optimizer=optimizer, accumulating=accumulating)
        log_plan(report.in_one_line())

    def _add_figures(self, logs: dict[str, float], device: torch.device) -> None:
        """To the logs of training, but not to those of evaluation."""
        if self.report is not None and {"loss", "train_loss"} & logs.keys():
            logs.update({**self._unlogged, **peak_figures(device)})
            self._unlogged = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.report is None:
            logger.warning(
                "invact patched nothing: training never called the forward of the Trainer's model. If compute_loss "
                "calls a part of it only, use invact.patch on that part before training."
            )
        if state.is_world_process_zero and (line := self._true_peak(args.device)) is not None:
            logger.info(line)
        self._put_back()


def _autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else None


def _inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """The arguments of one call as `invact.patch` takes them: by position or by name, not mixed."""
    if not kwargs:
        return args
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}


# --- what a callback has no event for -----------------------------------------------------------------


class _TrainMinded:
    """`Trainer.train` with an eye on the callbacks here, for as long as there are any.

    Two things can not be done by a callback: to put the model back when a run fails, which no callback is told; and to
    add to a log so that TensorBoard and W&B get it, whose callbacks stand first and have written it by then. Nor is a
    callback ever told which Trainer it belongs to, and when it is first called in a run, `train` is already under way.
    So `train` itself is wrapped: when the first callback is made, not at import; and `Trainer` has its own method back
    when the last is gone. A Trainer without such a callback is passed straight through. In a run `log` is wrapped, on
    that one Trainer; the list of its callbacks stays as the user made it.
    """

    def __init__(self) -> None:
        self._living = 0
        self._stock: Callable[..., Any] | None = None
        self._wrapped: Callable[..., Any] | None = None

    def while_living(self, callback: InvActCallback) -> None:
        if not self._living and Trainer.train is not self._wrapped:
            self._stock = Trainer.train
            self._wrapped = _minding(self._stock)
            Trainer.train = self._wrapped  # type: ignore[method-assign]
        self._living += 1
        weakref.finalize(callback, self._leave).atexit = False

    def _leave(self) -> None:
        self._living -= 1
        # What another library has put over ours since, and calls ours, stays.
        if not self._living and self._stock is not None and Trainer.train is self._wrapped:
            Trainer.train = self._stock  # type: ignore[method-assign]


_train = _TrainMinded()


def _minding(train: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(train)
    def wrapped(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        def ours() -> list[InvActCallback]:
            return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, InvActCallback)]

        if not ours():
            return train(trainer, *args, **kwargs)
        try:
            with _logging_figures(trainer, ours):
                return train(trainer, *args, **kwargs)
        finally:
            for callback in ours():
                callback._put_back()

    return wrapped


@contextmanager
def _logging_figures(trainer: Trainer, callbacks: Callable[[], list[InvActCallback]]) -> Iterator[None]:
    """Every training log of this Trainer gets the figures before anybody sees it."""
    log = trainer.log
    of_its_own = vars(trainer).get("log")

    @functools.wraps(log)
    def with_figures(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for callback in callbacks():
            callback._add_figures(logs, trainer.args.device)
        log(logs, *args, **kwargs)

    trainer.log = with_figures  # type: ignore[method-assign]
    try:
        yield
    finally:
        if of_its_own is None:
            del trainer.log
        else:
            trainer.log = of_its_own  # type: ignore[method-assign]
