"""`InvActCallback` for transformers.Trainer: patched before the first step, put back after the last."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from invact.arguments import Inputs
from invact.during_training import PatchedDuringTraining, peak_figures

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
    stock modules.

    The plan is logged once, at level INFO (`TrainingArguments(log_level="info")`), and stays in `report`. The
    first training log carries `invact/sites`, `invact/bytes_before`, `invact/bytes_after`,
    `invact/bytes_saved` and `invact/saving`; on a GPU every training log carries `invact/peak_memory_bytes`.

    Args:
        include: glob patterns over site paths; only these sites may be inverted.
        exclude: glob patterns over site paths; these sites are kept.
        side_bits: 1, 2 or 4 bits per element for curves with two sides; see `invact.patch`.

    Raises:
        Exception: what `invact.patch` raises, from `trainer.train()`.

    Example:
        >>> callback = InvActCallback(exclude="lm_head.*")
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> print(callback.report)  # doctest: +SKIP
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin()  # again and without an end where auto_find_batch_size tries a smaller batch
        log_plan = logger.info if state.is_world_process_zero else logger.debug
        hook = functools.partial(self._patch_at_first_batch, _autocast_dtype(args), log_plan)
        hook = torch.compiler.disable(hook)  # under torch.compile it is not to be compiled into the model
        self._undo.callback(kwargs["model"].register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _patch_at_first_batch(
        self,
        autocast: torch.dtype | None,
        log_plan: Callable[[str], None],
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return  # evaluation before the first step
        self._put_back()  # takes this hook out
        report = self._patch(model, _inputs(model, args, kwargs), autocast)
        log_plan(f"invact\n{report}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if self.report is None or not {"loss", "train_loss"} & logs.keys():
            return
        figures = {**self._unlogged, **peak_figures(args.device)}
        self._unlogged = {}
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.report is None:
            logger.warning(
                "invact patched nothing: training never called the forward of the Trainer's model. If compute_loss "
                "calls a part of it only, use invact.patch on that part before training."
            )
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


def _minding_its_callback(train: Callable[..., Any]) -> Callable[..., Any]:
    """`Trainer.train` that does the two things for which a callback has no event.

    A failed run is told to no callback. And what a callback adds to a log is seen only by the callbacks after it,
    while those that write to TensorBoard and W&B stand first.
    """

    @functools.wraps(train)
    def wrapped(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        callbacks = trainer.callback_handler.callbacks
        callbacks.sort(key=lambda callback: not isinstance(callback, InvActCallback))
        try:
            return train(trainer, *args, **kwargs)
        finally:
            for callback in callbacks:
                if isinstance(callback, InvActCallback):
                    callback._put_back()

    return wrapped


Trainer.train = _minding_its_callback(Trainer.train)  # type: ignore[method-assign]
