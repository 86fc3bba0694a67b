"""`InvActCallback` for Lightning's Trainer: patched before the first step, put back after the last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from invact.during_training import PatchedDuringTraining, peak_figures

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
except ImportError as error:
    raise ImportError(
        "invact.lightning is for Lightning's Trainer, but lightning can not be imported. "
        "Install it: pip install 'invact[lightning]'"
    ) from error

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class InvActCallback(PatchedDuringTraining, Callback):
    """Trains with inverted activations: add it to the callbacks of a Lightning `Trainer`.

    The plan is made of `training_step` on the first batch, under the precision of the Trainer; neither the data
    nor the random numbers of the run change. The module is put back when training ends, also by an error or
    Ctrl-C. Checkpoints are those of the stock model. Validation runs the stock modules.

    One line at level INFO says what was done and which peak is predicted for a step with the Trainer's first optimizer,
    and on a GPU a second one at the end what the peak was; the plan itself stays in `report`. The Trainer's loggers are
    given `invact/sites`, `invact/bytes_before`, `invact/bytes_after`, `invact/bytes_saved`, `invact/saving` and
    `invact/predicted_peak_bytes` after the first step, and on a GPU `invact/peak_memory_bytes` there and after every
    epoch.

    A module that steps its optimizers itself (`automatic_optimization = False`) is left as it is, with a warning:
    its `training_step` can not be tried out. Use `invact.patch` on its networks before training.

    Args:
        include: glob patterns over paths; only these sites may be inverted, and only inside these modules is derived.
        exclude: glob patterns over paths; these sites are kept, and inside these modules nothing is derived.
        exact: nothing is inverted, activations are derived instead, and the gradients are bit for bit the stock ones.
        few_bits: 1 to 4 bits per element, and approximate gradients, where neither inverting nor deriving pays.
        memory: as "24GiB": where inverting and deriving do not do, the fewest blocks are checkpointed with which a step
            fits; see `invact.fit`. None: nothing is checkpointed.

    Raises:
        Exception: what `invact.patch` raises or, with `memory`, `invact.fit`, from `trainer.fit()`.

    Example:
        >>> callback = InvActCallback(exclude="head.*")
        >>> trainer = Trainer(max_epochs=3, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.fit(module, dataloader)  # doctest: +SKIP
        >>> print(callback.report)  # doctest: +SKIP
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin()
        if not pl_module.automatic_optimization:
            rank_zero_warn(
                "invact patches nothing: this module steps its optimizers itself, so its training_step can not be "
                "tried out. Use invact.patch on its networks before training."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.report is None and pl_module.automatic_optimization:
            autocast = _AUTOCAST.get(str(trainer.precision))
            with _logging_muted(pl_module):
                report = self._patch(
                    TrainingStep(pl_module),
                    (batch, batch_idx),
                    autocast,
                    optimizer=trainer.optimizers[0] if trainer.optimizers else None,
                    accumulating=trainer.accumulate_grad_batches > 1,
                    within="module.",
                )
            rank_zero_info(report.in_one_line())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._unlogged:
            _log(trainer, {**self._unlogged, **peak_figures(pl_module.device)})
            self._unlogged = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _log(trainer, peak_figures(pl_module.device))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (line := self._true_peak(pl_module.device)) is not None:
            rank_zero_info(line)
        self._put_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._put_back()


class TrainingStep(nn.Module):
    """A module whose call is the training step of another."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any, batch_idx: int) -> Any:
        return self.module.training_step(batch, batch_idx)


@contextmanager
def _logging_muted(module: LightningModule) -> Iterator[None]:
    """Keeps what a tried-out step logs from the Trainer."""
    names = [name for name in ("log", "log_dict") if name not in module.__dict__]
    module.__dict__.update(dict.fromkeys(names, _ignore))
    try:
        yield
    finally:
        for name in names:
            del module.__dict__[name]


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def _log(trainer: Trainer, figures: dict[str, float]) -> None:
    for logger in trainer.loggers if figures else ():
        logger.log_metrics(figures, step=trainer.global_step)
