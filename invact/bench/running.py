"""One run of `invact bench`: kernels, then steps, and whatever there is if it is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from invact.bench.contenders import CHECKPOINTING, NAMES, not_installed
from invact.bench.kernels import time_kernels
from invact.bench.result import Bench
from invact.bench.steps import time_steps
from invact.kernels import CURVES

KERNELS, STEPS = "kernels", "steps"
DEFAULT_CURVES = ("gelu", "silu")
CPU, GPU = "cpu", "cuda"
# By the type of the device: what a default run can do in three or four minutes on two CPU cores.
DEFAULT_MODELS = {
    CPU: ("bert-base-uncased",),
    GPU: ("bert-base-uncased", "timm/vit_base_patch16_224", "gpt2"),
}
DEFAULT_DTYPE = {CPU: torch.float32, GPU: torch.bfloat16}
DEFAULT_ELEMENTS = {CPU: 1 << 22, GPU: 1 << 26}
DEFAULT_BATCH_SIZE = {CPU: 8, GPU: 32}
DEFAULT_KERNEL_ROUNDS = {CPU: 15, GPU: 30}
DEFAULT_STEP_ROUNDS = {CPU: 3, GPU: 20}


class BenchError(ValueError):
    """A curve or a contender that there is not."""


def run(
    only: str | None = None,
    *,
    curves: Sequence[str] = (),
    models: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = (),
    against: Sequence[str] = (),
    elements: int | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    image_size: int | None = None,
    rounds: int | None = None,
    device: torch.device | None = None,
    command: str = "",
    on_turn: Callable[[str], None] = lambda what: None,
) -> Bench:
    """Times kernels, steps or both against stock PyTorch and others, in turns.

    Args:
        only: "kernels" or "steps".
        curves: keys of `invact.kernels.CURVES`, or "all".
        models: as of `patchers.load`.
        dtypes: of the tensors of a kernel, and of the parameters of a model.
        against: of `invact.bench.contenders.NAMES`. By default all of them for kernels, checkpointing for steps.
        device: the GPU by default, if there is one.
        on_turn: called after every turn, with what it was.

    Raises:
        BenchError: no curve or contender goes by a name.
        ModelNameError, MissingLibraryError, InputSizeError, StepError: as of `time_steps`.
        KeyboardInterrupt: before anything was measured; later it ends the run, and what there is comes back.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = device.type
    if "all" in curves:
        curves = list(CURVES)
    _check("curve", curves, list(CURVES))
    _check("contender", against, NAMES)
    bench = Bench.on(device, command)
    dtypes = dtypes or [DEFAULT_DTYPE[kind]]
    try:
        if only != STEPS:
            for package in not_installed(against or NAMES):
                bench.leave_out(package, "not installed")
            time_kernels(
                bench,
                curves or DEFAULT_CURVES,
                dtypes,
                elements=elements or DEFAULT_ELEMENTS[kind],
                rounds=rounds or DEFAULT_KERNEL_ROUNDS[kind],
                against=against or NAMES,
                device=device,
                with_copy=kind == GPU,
                on_turn=on_turn,
            )
        if only != KERNELS:
            time_steps(
                bench,
                models or DEFAULT_MODELS[kind],
                dtypes,
                batch_size=batch_size or DEFAULT_BATCH_SIZE[kind],
                seq_len=seq_len,
                image_size=image_size,
                rounds=rounds or DEFAULT_STEP_ROUNDS[kind],
                against=against or [CHECKPOINTING],
                device=device,
                on_turn=on_turn,
            )
    except KeyboardInterrupt:
        bench.interrupted = True
        bench.drop_unfinished()
        if not bench.kernels and not bench.steps:
            raise
    return bench


def _check(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise BenchError(f"There is no {what} {name!r} here. Choose from {', '.join(known)}.")
