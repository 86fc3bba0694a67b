"""`invact trial`: the same training with and without invact and checkpointing, compared."""

from __future__ import annotations

import os
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from invact.commands.adapters import Adapters, asked_for
from invact.commands.options import (
    Dtype,
    Exact,
    GpuMemory,
    HtmlFile,
    LoraDropout,
    LoraRank,
    LoraTargets,
    one_name,
    torch_dtype,
)
from invact.commands.output import (
    check_page_can_be_made,
    command,
    duration_in_words,
    end_interrupted,
    fail,
    library_chatter_on_stderr,
    print_report,
    progress,
    write,
)

if TYPE_CHECKING:
    from invact.pages.page import Page
    from invact.trial.result import Trial

DEFAULT_BATCH_SIZE = 8
DEFAULT_LEARNING_RATE = 5e-4


class Also(str, Enum):
    """Ways of training on demand: those of `invact.trial.ways`, and all of them."""

    exact = "exact"
    selective = "selective"
    fit = "fit"
    compression = "compression"
    fewbit_1 = "fewbit-1"
    fewbit_2 = "fewbit-2"
    fewbit_3 = "fewbit-3"
    fewbit_4 = "fewbit-4"
    all = "all"


def trial(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="As of `invact patch`. Default: a small BERT.", show_default=False),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The same as NAME.", metavar="NAME")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A text file, a folder of images, or `digits`. Default: what comes with Python."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="For every way of training and every seed.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a step.")] = DEFAULT_BATCH_SIZE,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens in a sample of text.")] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="fp32, or what autocast computes in. Default: bf16 on a GPU, fp32 without."),
    ] = None,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = DEFAULT_LEARNING_RATE,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds; the spread between them is the yardstick.")] = 3,
    compiled: Annotated[bool, typer.Option("--compile", help="Train under torch.compile as well.")] = False,
    checkpointing: Annotated[bool, typer.Option(help="Train with gradient checkpointing as well.")] = True,
    also: Annotated[
        list[Also] | None,
        typer.Option(
            help="One more way, as often as it is given. selective: PyTorch's selective checkpointing; fit: the fewest "
            "blocks checkpointed for --gpu-memory; compression: gradients in bf16 between two processes; fewbit-K: "
            "approximate derivatives of K bits.",
            show_default=False,
        ),
    ] = None,
    lora_rank: LoraRank = None,
    lora_dropout: LoraDropout = None,
    lora_targets: LoraTargets = None,
    exact: Exact = False,
    gpu_memory: GpuMemory = None,
    html: HtmlFile = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON and nothing else.")] = False,
) -> None:
    """Train the same model from the same seeds with and without invact and checkpointing, and compare.

    NAME may also be small-bert, small-gpt2 or small-llama.
    """
    # Threads that spin while they wait take ten times as long where others use the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    chosen = one_name("trial", name, model)
    check_page_can_be_made(html)
    with library_chatter_on_stderr():
        result = _trained(
            chosen,
            data,
            steps=steps,
            batch_size=batch_size,
            seq_len=seq_len,
            dtype=dtype,
            learning_rate=learning_rate,
            seeds=range(seed, seed + seeds),
            checkpointing=checkpointing,
            compiled=compiled,
            also=_chosen(also or [], gpu_memory),
            adapters=asked_for(lora_rank, lora_dropout, lora_targets, quantize=None),
            exact=exact,
            gpu_memory=gpu_memory,
        )
    if json:
        typer.echo(result.to_json())
    else:
        print_report(result)
    if html:  # after the figures, which took long
        with library_chatter_on_stderr():
            page = _trial_page(result).html()
        write(page, html)
    if result.interrupted:
        end_interrupted("Interrupted: the figures are of the steps taken so far.")


def _trained(
    name: str | None,
    data: str | None,
    *,
    steps: int,
    batch_size: int,
    seq_len: int | None,
    dtype: Dtype | None,
    learning_rate: float,
    seeds: range,
    checkpointing: bool,
    compiled: bool,
    also: list[str],
    adapters: Adapters | None,
    exact: bool,
    gpu_memory: int | None,
) -> Trial:
    try:
        import torch

        from invact import patchers
        from invact.simulation.setting import Setting
        from invact.trial.comparing import train_in_ways
        from invact.trial.data import DataError
        from invact.trial.processes import ProcessError
        from invact.trial.task import NotTrainableError, make_task
        from invact.trial.ways import COMPILED_WAYS, WAYS, way_called

        try:
            task = make_task(name, data, seq_len, adapters)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            dtype = dtype or (Dtype.bf16 if device.type == "cuda" else Dtype.fp32)
            ways = [way for way in WAYS if checkpointing or not way_called(way).checkpointed]
            ways += [*(COMPILED_WAYS if compiled else ()), *also]
            with progress(steps * len(seeds) * len(ways)) as shown:

                def tell(seconds: float, steps_left: int) -> None:
                    shown.expect(steps_left)
                    shown.say(_estimate_in_words(seconds, steps, seeds))

                shown.say(f"Training {task.title}: first two steps of each way, to see how long it takes.")
                return train_in_ways(
                    task,
                    steps=steps,
                    batch_size=batch_size,
                    learning_rate=learning_rate,
                    seeds=seeds,
                    ways=ways,
                    setting=Setting(device, None if dtype is Dtype.fp32 else torch_dtype(dtype.value)),
                    exact=exact,
                    memory_bytes=gpu_memory,
                    on_step=shown.advance,
                    on_estimate=tell,
                )
        except (DataError, NotTrainableError, ProcessError, patchers.RequestError) as error:
            fail(str(error))
    except KeyboardInterrupt:
        end_interrupted("Interrupted before there was anything to report.")


def _chosen(also: list[Also], gpu_memory: int | None) -> list[str]:
    """Each once, in the order of the list above; of all, without "fit" where there is nothing to fit."""
    if Also.fit in also and gpu_memory is None:
        fail("The way fit is to fit a memory, and none was named. Name it: --also fit --gpu-memory 24GiB")
    wanted = set(also)
    if Also.all in also:
        wanted |= set(Also) - ({Also.fit} if gpu_memory is None else set())
    return [way.value for way in Also if way in wanted - {Also.all}]


def _estimate_in_words(seconds: float, steps: int, seeds: range) -> str:
    lot = f"{steps} steps of each way" + (f" from each of {len(seeds)} seeds" if len(seeds) > 1 else "")
    return (
        f"About {duration_in_words(seconds)} more for {lot}. "
        "Fewer --steps or --seeds or a smaller --batch-size take less; Ctrl-C reports what there is by then."
    )


def _trial_page(result: Trial) -> Page:
    from invact.pages.page import trial_page

    return trial_page(result, command())
