"""`invact patch`: what patching a model would save in training on a GPU, as a dry run."""

from __future__ import annotations

import json as json_format
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from invact.commands.adapters import Adapters, asked_for
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
    torch_dtype,
)
from invact.commands.output import check_page_can_be_made, command, fail, library_chatter_on_stderr, print_report, write
from invact.own_errors import first_line, own_error
from invact.sizes import size_in_words

if TYPE_CHECKING:
    import torch
    from torch import nn

    from invact.fitting_batch import Fit
    from invact.layers import Layer
    from invact.page import Page
    from invact.report import Report
    from invact.simulation import Setting

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
    """The keys of `invact.fitting_batch.STATES`."""

    adamw = "adamw"
    momentum = "momentum"
    sgd = "sgd"


def patch(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help=MODEL_NAMES, show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="The same as NAME.", metavar="NAME")] = None,
    library: Annotated[LibraryName | None, typer.Option(help="Overrides what the name says.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a step.")] = DEFAULT_BATCH_SIZE,
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
    gpu_memory: GpuMemory = None,
    optimizer: Annotated[Optimizer, typer.Option(help="Whose states share the GPU; with --gpu-memory.")] = (
        Optimizer.adamw
    ),
    target_batch: Annotated[
        int | None, typer.Option(min=1, help="Say what it takes to fit this batch; with --gpu-memory.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Count a step under torch.compile as well.")] = False,
    html: HtmlFile = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """Dry run: what patching the model would save in training on a GPU. Needs neither the GPU nor weights."""
    chosen = one_name("patch", name, model)
    if chosen is None:
        fail("No model was named. Pass its name, as in invact patch bert-base-uncased, or --model and its name.")
    if target_batch is not None and gpu_memory is None:
        fail("--target-batch asks what fits, and needs to know where. Add --gpu-memory, as in --gpu-memory 24GiB.")
    if exact and few_bits is not None:
        fail("--exact asks for stock's gradients and --few-bits for approximate ones. Leave one of them out.")
    adapters = asked_for(lora_rank, lora_dropout, lora_targets, quantize and quantize.value)
    check_page_can_be_made(html)
    with library_chatter_on_stderr():
        report, fit, page = _dry_run(
            chosen,
            library=library and library.value,
            batch_size=batch_size,
            seq_len=seq_len,
            image_size=image_size,
            dtype=(dtype or (Dtype.fp32 if autocast else Dtype.bf16)).value,
            autocast=autocast and autocast.value,
            attention=attention.value,
            exact=exact,
            few_bits=few_bits,
            adapters=adapters,
            gpu_memory=gpu_memory,
            optimizer=optimizer.value,
            target_batch=target_batch,
            compiled=compiled,
            with_page=html is not None,
        )
    if json:
        typer.echo(json_format.dumps({**report.to_dict(), "fit": fit.to_dict()}, indent=2) if fit else report.to_json())
    else:
        print_report(report, *([str(fit)] if fit else ()))
    if page and html:
        write(page.html(), html)


def _dry_run(
    name: str,
    *,
    library: str | None,
    batch_size: int,
    seq_len: int | None,
    image_size: int | None,
    dtype: str,
    autocast: str | None,
    attention: str,
    exact: bool,
    few_bits: int | None,
    adapters: Adapters | None,
    gpu_memory: int | None,
    optimizer: str,
    target_batch: int | None,
    compiled: bool,
    with_page: bool,
) -> tuple[Report, Fit | None, Page | None]:
    from invact import patchers
    from invact.planning import decide_for_device

    precision = f"{dtype}, autocast {autocast}" if autocast else dtype
    autocast_dtype = torch_dtype(autocast) if autocast else None
    try:
        loaded = _loaded(name, torch_dtype(dtype), library, image_size)
        title = [name, type(loaded).__name__, *([str(adapters)] if adapters else [])]
        model = adapters.put_into(loaded) if adapters else loaded
        inputs = patchers.example_inputs(model, batch_size, seq_len, image_size)
    except patchers.RequestError as error:
        fail(str(error))
    try:
        decided = decide_for_device(
            model,
            inputs,
            autocast=autocast_dtype,
            attention=attention,
            exact=exact,
            few_bits=few_bits,
            title=" · ".join([*title, size_in_words(inputs), precision]),
        )
    except Exception:
        # A size that only the model itself can reject is bad input; anything else is a fault, with its traceback.
        given = _sizes_in_words(seq_len, image_size)
        why = own_error(lambda: _run_on_meta(model, inputs)) if given else None
        if why is None:
            raise
        _fail_for_sizes(name, given, why)
    import torch

    from invact.simulation import Setting

    setting = Setting(torch.device("cuda"), autocast_dtype, attention)
    if compiled:
        _count_compiled(decided.report, model, inputs, setting)
    fit = page = None
    if gpu_memory is not None:
        from invact.fitting_batch import Fit, needs
        from invact.trial_task import with_labels

        def training_inputs(size: int) -> Any:
            return with_labels(
                patchers.without_adapters(model), patchers.example_inputs(model, size, seq_len, image_size)
            )

        fit = Fit(
            gpu_memory, optimizer, needs(model, training_inputs, setting, decided, optimizer=optimizer), target_batch
        )
    if with_page:
        from invact.layers import memory_by_layer

        page = _plan_page(decided.report, memory_by_layer(model, inputs, setting, decided), fit)
    return decided.report, fit, page


def _count_compiled(report: Report, model: nn.Module, inputs: Any, setting: Setting) -> None:
    from invact.compiled_bytes import compiled_bytes

    counted = compiled_bytes(model, inputs, setting)
    if counted.by_default is not None and counted.with_invact is not None:
        report.compiled = {"default": counted.by_default, "invact": counted.with_invact}
    report.notes += counted.notes


def _loaded(name: str, dtype: torch.dtype, library: str | None, image_size: int | None) -> nn.Module:
    """Fails with a sentence where the model can be built, but not for images of this size."""
    from invact import patchers

    try:
        model: nn.Module = patchers.load(name, dtype, library=library, image_size=image_size)
        return model
    except patchers.RequestError:
        raise
    except Exception as error:
        if image_size is None:
            raise
        try:
            patchers.load(name, dtype, library=library)
        except Exception:
            raise error from None
        _fail_for_sizes(name, _sizes_in_words(None, image_size), error)


def _run_on_meta(model: nn.Module, inputs: Any) -> None:
    import torch

    from invact.pytorch_inside import tree_map_only

    on_meta = tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs)
    model(**on_meta) if isinstance(on_meta, dict) else model(*on_meta)


def _sizes_in_words(seq_len: int | None, image_size: int | None) -> str:
    sizes = {"--seq-len": seq_len, "--image-size": image_size}
    return " ".join(f"{option} {size}" for option, size in sizes.items() if size is not None)


def _fail_for_sizes(name: str, given: str, why: Exception) -> NoReturn:
    fail(f"{name} does not run with {given}: {first_line(why)}. Leave it out for the model's own size.")


def _plan_page(report: Report, layers: list[Layer], fit: Fit | None) -> Page:
    from invact.page import plan_page

    return plan_page(report, layers, command(), str(fit or ""))
