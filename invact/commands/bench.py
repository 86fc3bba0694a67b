"""`invact bench`: kernels and whole steps timed against stock PyTorch and others."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invact.commands.options import Dtype, torch_dtype
from invact.commands.output import (
    check_writable,
    command,
    end_interrupted,
    fail,
    library_chatter_on_stderr,
    print_report,
    progress,
    write,
)

if TYPE_CHECKING:
    from invact.bench.result import Bench


class Only(str, Enum):
    kernels = "kernels"
    steps = "steps"


def bench(
    only: Annotated[Only | None, typer.Option(help="Default: both.")] = None,
    curve: Annotated[
        list[str] | None, typer.Option(help="Repeatable, or `all`. Default: gelu and silu.", show_default=False)
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="As of `invact patch`; repeatable. Default: BERT-base, on a GPU also ViT-B/16 and GPT-2."),
    ] = None,
    dtype: Annotated[
        list[Dtype] | None,
        typer.Option(help="Of tensors and parameters; repeatable. Default: fp32, on a GPU bf16."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="compile, checkpointing, optiacts, fewbit or timm besides stock; repeatable. Default: for kernels "
            "all, for steps checkpointing, since compiling a model takes minutes. `stock` alone leaves all others out."
        ),
    ] = None,
    elements: Annotated[
        int | None, typer.Option(min=1, help="Of a kernel's tensor. Default: 4194304, on a GPU 67108864.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples. Default: 8, on a GPU 32.")] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens, of models that read text. Default: 128, on a GPU 512.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels to a side, of models that read images. Default: the model's own.")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="In which each has a turn. Default: kernels 15, steps 3; on a GPU 30 and 20."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, metavar="FILE", help="Write the JSON to a file as well.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON and nothing else.")] = False,
) -> None:
    """Time single activations and whole steps against stock PyTorch and others, in turns."""
    check_writable(output, "--output")
    with library_chatter_on_stderr():
        result = _measured(
            only=only and only.value,
            curves=curve or (),
            models=model or (),
            dtypes=[torch_dtype(chosen.value) for chosen in dtype or ()],
            against=against or (),
            elements=elements,
            batch_size=batch_size,
            seq_len=seq_len,
            image_size=image_size,
            rounds=rounds,
            command=command(),
        )
    if json:
        typer.echo(result.to_json())
    else:
        print_report(result)
    if output:
        write(result.to_json() + "\n", output)
    if result.interrupted:
        end_interrupted("Interrupted: the figures are of the rounds that were complete.")


def _measured(**options: Any) -> Bench:
    try:
        from invact import patchers
        from invact.bench.running import BenchError, run
        from invact.bench.steps import StepError

        try:
            with progress(total=None) as shown:
                return run(**options, on_turn=shown.advance)
        except (BenchError, StepError, patchers.RequestError) as error:
            fail(str(error))
    except KeyboardInterrupt:
        end_interrupted("Interrupted before the first round was complete: there is nothing to report.")
