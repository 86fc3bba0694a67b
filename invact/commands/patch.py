"""`invact patch`: what patching a model would save in training on a GPU, as a dry run."""

from __future__ import annotations

import json as json_format
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invact.commands.adapters import asked_for
from invact.commands.options import (
    MODEL_NAMES,
    Dtype,
    Exact,
    FewBits,
    GpuMemory,
    HtmlFile,
    LoraDropout,
    LoraRank,
    LoraTargets,
    Quantize,
    one_name,
)
from invact.commands.output import (
    check_page_can_be_made,
    command,
    fail,
    garbage_left_alone,
    library_chatter_on_stderr,
    print_report,
    write,
)
from invact.commands.workload import Workload

if TYPE_CHECKING:
    from torch import nn

    from invact.fitting.batches import Batches
    from invact.fitting.step import Step
    from invact.pages.page import Page
    from invact.planning.plans import Decided

DEFAULT_BATCH_SIZE = 32


class LibraryName(str, Enum):
    """The libraries of `invact.patchers`, listed here so that `--help` need not import them."""

    transformers = "transformers"
    timm = "timm"
    open_clip = "open_clip"


class Autocast(str, Enum):
    bf16 = "bf16"
    fp16 = "fp16"


class Attention(str, Enum):
    fused = "fused"
    math = "math"


class Optimizer(str, Enum):
    """The names of `invact.fitting.optimizers`, listed here so that `--help` need not import them; a test compares."""

    adamw = "adamw"
    adamw_fused = "adamw-fused"
    adamw_8bit = "adamw-8bit"
    adafactor = "adafactor"
    momentum = "momentum"
    sgd = "sgd"
    none = "none"


def patch(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help=MODEL_NAMES, show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="The same as NAME.", metavar="NAME")] = None,
    library: Annotated[LibraryName | None, typer.Option(help="Overrides what the name says.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Samples in a step. Default: 32. With --gpu-memory, the batch that is to fit."),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens. Default: 512, or the model's maximum if less.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels to a side. Default: the model's own.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the parameters. Default: bf16; with --autocast, fp32.")
    ] = None,
    autocast: Annotated[Autocast | None, typer.Option(help="Plan for training under torch.autocast.")] = None,
    attention: Annotated[
        Attention, typer.Option(help="Count attention as a fused kernel, or with its N x N matrix.")
    ] = Attention.fused,
    exact: Exact = False,
    few_bits: FewBits = None,
    lora_rank: LoraRank = None,
    lora_dropout: LoraDropout = None,
    lora_targets: LoraTargets = None,
    quantize: Quantize = None,
    no_loss: Annotated[
        bool, typer.Option("--no-loss", help="Leave the loss out, which Hugging Face models compute.")
    ] = False,
    gpu_memory: GpuMemory = None,
    optimizer: Annotated[
        Optimizer, typer.Option(help="Whose states and step share the GPU; adamw is PyTorch's, as it is by default.")
    ] = Optimizer.adamw,
    compiled: Annotated[bool, typer.Option("--compile", help="Count a step under torch.compile as well.")] = False,
    html: HtmlFile = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """Dry run: what patching the model would save in training on a GPU. Needs neither the GPU nor weights."""
    chosen = one_name("patch", name, model)
    if chosen is None:
        fail("No model was named. Pass its name, as in invact patch bert-base-uncased, or --model and its name.")
    if exact and few_bits is not None:
        fail("--exact asks for stock's gradients and --few-bits for approximate ones. Leave one of them out.")
    adapters = asked_for(lora_rank, lora_dropout, lora_targets, quantize and quantize.value)
    check_page_can_be_made(html)
    asked = Workload(
        chosen,
        library=library and library.value,
        batch_size=batch_size or DEFAULT_BATCH_SIZE,
        seq_len=seq_len,
        image_size=image_size,
        dtype=(dtype or (Dtype.fp32 if autocast else Dtype.bf16)).value,
        autocast=autocast and autocast.value,
        attention=attention.value,
        exact=exact,
        few_bits=few_bits,
        adapters=adapters,
        loss=not no_loss,
    )
    with library_chatter_on_stderr(), garbage_left_alone():
        loaded, inputs, decided = asked.decided()
        if compiled:
            _count_compiled(decided, loaded, inputs)
        course, why_not = _step(decided, loaded, inputs, optimizer.value, gpu_memory if batch_size else None)
        batches = None
        if gpu_memory is not None and batch_size is None:
            batches = _batches(asked, decided, loaded, optimizer.value, gpu_memory)
        said = [*decided.report.peak_in_words(), *([str(batches)] if batches else []), *([why_not] if why_not else [])]
        page = _page(decided, loaded, inputs, said, course) if html else None
    report = decided.report
    if json:
        fit = {"fit": batches.to_dict()} if batches else {}
        typer.echo(json_format.dumps({**report.to_dict(), **fit}, indent=2))
    else:
        print_report(report, *([str(batches)] if batches else ()), *([why_not] if why_not else ()))
    if page and html:
        write(page.html(), html)
    if why_not:
        if json:
            typer.echo(why_not, err=True)
        raise typer.Exit(code=1)


def _step(
    decided: Decided, model: nn.Module, inputs: Any, optimizer: str, memory: int | None
) -> tuple[tuple[Step, Step] | None, str]:
    """A step before and after, or neither where it can not be simulated, and why it does not fit; "" if it does."""
    from invact.fitting.choosing import DoesNotFitError, fit_in
    from invact.fitting.optimizers import NotSimulatedError
    from invact.simulation.time_limit import TookTooLongError

    try:
        found = fit_in(decided, model, inputs, optimizer=optimizer, memory=memory, quick=True)
    except DoesNotFitError as error:
        return (error.least.before, error.least.after), str(error)
    except (NotSimulatedError, TookTooLongError) as error:
        if memory is not None:
            fail(str(error))
        decided.report.notes.append(str(error))
        return None, ""
    return (found.before, found.after), ""


def _batches(asked: Workload, decided: Decided, model: nn.Module, optimizer: str, memory: int) -> Batches:
    from invact.fitting.batches import Batches, needs
    from invact.fitting.optimizers import NotSimulatedError

    try:
        found = needs(model, lambda size: asked.inputs(model, size), decided.setting, decided, optimizer=optimizer)
    except NotSimulatedError as error:
        fail(str(error))
    return Batches(memory, optimizer, found)


def _page(
    decided: Decided, model: nn.Module, inputs: Any, what_fits: list[str], course: tuple[Step, Step] | None
) -> Page:
    from invact.pages.page import plan_page
    from invact.planning.by_layer import memory_by_layer

    layers = memory_by_layer(model, inputs, decided.setting, decided)
    return plan_page(decided.report, layers, command(), "\n".join(what_fits), course)


def _count_compiled(decided: Decided, model: nn.Module, inputs: Any) -> None:
    from invact.compiling.compiled_bytes import compiled_bytes

    report = decided.report
    counted = compiled_bytes(model, inputs, decided.setting)
    if counted.by_default is not None and counted.with_invact is not None:
        report.compiled = {"default": counted.by_default, "invact": counted.with_invact}
    report.notes += counted.notes
