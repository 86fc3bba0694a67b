"""The command line: `invact patch` plans for training on a GPU, `invact trial` trains with and without.

Only typer is imported here: torch and the model libraries wait until a command needs them.
"""

from __future__ import annotations

import contextlib
import json as json_format
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from invact import __version__

if TYPE_CHECKING:
    import torch

    from invact.fitting_batch import Fit
    from invact.layers import Layer
    from invact.page import Page
    from invact.report import Report
    from invact.trial_result import Trial

DEFAULT_BATCH_SIZE = 32
DEFAULT_TRIAL_BATCH_SIZE = 8


class LibraryName(str, Enum):
    """The libraries of `invact.patchers`, listed here so that `--help` need not import them."""

    transformers = "transformers"
    timm = "timm"
    open_clip = "open_clip"


class Dtype(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


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


def _memory_bytes(text: str) -> int:
    """As "24GiB" or "80 GB"; without a unit, bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", text.strip(), flags=re.IGNORECASE)
    if match is None or not float(match[1]):
        raise typer.BadParameter(f"{text!r} is no amount of memory. Write it as 24GiB.")
    number, prefix, binary = match.groups()
    exponent = " KMGT".index(prefix.upper()) if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** exponent)


GpuMemory = Annotated[
    int | None,
    typer.Option("--gpu-memory", parser=_memory_bytes, metavar="SIZE", help="Say which batch fits, as in 24GiB."),
]
HtmlFile = Annotated[
    Path | None, typer.Option("--html", dir_okay=False, metavar="FILE", help="Write a page that opens offline.")
]


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train in less memory: pointwise activations replaced in place by inverted ones.",
)


def main() -> None:
    """Run the command line; what `invact` on the shell calls."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"invact {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Keeps `patch` a command of its own."""


@app.command()
def patch(
    model: Annotated[
        str,
        typer.Option(
            help="bert-base-uncased, timm/vit_base_patch16_224, open_clip/ViT-B-32, a hub name org/name, "
            "or a directory with a config.json."
        ),
    ],
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
    gpu_memory: GpuMemory = None,
    optimizer: Annotated[Optimizer, typer.Option(help="Whose states share the GPU; with --gpu-memory.")] = (
        Optimizer.adamw
    ),
    target_batch: Annotated[
        int | None, typer.Option(min=1, help="Say what it takes to fit this batch; with --gpu-memory.")
    ] = None,
    html: HtmlFile = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """Dry run: what patching the model would save in training on a GPU. Needs neither the GPU nor weights."""
    if target_batch is not None and gpu_memory is None:
        _fail("--target-batch asks what fits, and needs to know where. Add --gpu-memory, as in --gpu-memory 24GiB.")
    _check_writable(html)
    with _library_chatter_on_stderr():
        report, fit, page = _dry_run(
            model,
            library=library and library.value,
            batch_size=batch_size,
            seq_len=seq_len,
            image_size=image_size,
            dtype=(dtype or (Dtype.fp32 if autocast else Dtype.bf16)).value,
            autocast=autocast and autocast.value,
            attention=attention.value,
            gpu_memory=gpu_memory,
            optimizer=optimizer.value,
            target_batch=target_batch,
            with_page=html is not None,
        )
    if json:
        typer.echo(json_format.dumps({**report.to_dict(), "fit": fit.to_dict()}, indent=2) if fit else report.to_json())
    else:
        _print_report(report)
        if fit:
            typer.echo(fit)
    _write(page, html)


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
    gpu_memory: int | None,
    optimizer: str,
    target_batch: int | None,
    with_page: bool,
) -> tuple[Report, Fit | None, Page | None]:
    from invact import patchers
    from invact.planning import plan_for_device

    precision = f"{dtype}, autocast {autocast}" if autocast else dtype
    autocast_dtype = _torch_dtype(autocast) if autocast else None
    try:
        model = patchers.load(name, _torch_dtype(dtype), library=library, image_size=image_size)
        inputs = patchers.example_inputs(model, batch_size, seq_len, image_size)
        report = plan_for_device(
            model,
            inputs,
            autocast=autocast_dtype,
            attention=attention,
            title=" · ".join([name, type(model).__name__, _size_in_words(inputs), precision]),
        )
    except (patchers.ModelNameError, patchers.MissingLibraryError, patchers.InputSizeError) as error:
        _fail(str(error))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        # A size that only the model itself can reject is bad input; anything else is a fault, with its traceback.
        if seq_len is None and image_size is None:
            raise
        sizes = {"--seq-len": seq_len, "--image-size": image_size}
        given = " ".join(f"{option} {size}" for option, size in sizes.items() if size is not None)
        _fail(f"{name} does not run with {given}: {error}. Leave it out for the model's own size.")
    import torch

    from invact.simulation import Setting

    setting = Setting(torch.device("cuda"), autocast_dtype, attention)
    fit = page = None
    if gpu_memory is not None:
        from invact.fitting_batch import Fit, needs
        from invact.trial_task import with_labels

        def training_inputs(size: int) -> Any:
            return with_labels(model, patchers.example_inputs(model, size, seq_len, image_size))

        fit = Fit(gpu_memory, optimizer, needs(model, training_inputs, setting, optimizer=optimizer), target_batch)
    if with_page:
        from invact.layers import memory_by_layer
        from invact.planning import decide

        layers = memory_by_layer(model, inputs, setting, decide(model, inputs, autocast=autocast_dtype))
        page = _plan_page(report, layers, fit)
    return report, fit, page


@app.command()
def trial(
    model: Annotated[str | None, typer.Option(help="As of `invact patch`. Default: a small BERT.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A text file, a folder of images, or `digits`. Default: what comes with Python."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="For every way of training and every seed.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a step.")] = DEFAULT_TRIAL_BATCH_SIZE,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens in a sample of text.")] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="fp32, or what autocast computes in. Default: bf16 on a GPU, fp32 without."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds; the spread between them is the yardstick.")] = 3,
    compiled: Annotated[bool, typer.Option("--compile", help="Train under torch.compile as well.")] = False,
    gpu_memory: GpuMemory = None,
    html: HtmlFile = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON and nothing else.")] = False,
) -> None:
    """Train the same model from the same seeds with and without invact and checkpointing, and compare."""
    # Threads that spin while they wait take ten times as long where others use the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _check_writable(html)
    with _library_chatter_on_stderr():
        result = _trained(
            model,
            data,
            steps=steps,
            batch_size=batch_size,
            seq_len=seq_len,
            dtype=dtype,
            seeds=range(seed, seed + seeds),
            compiled=compiled,
            gpu_memory=gpu_memory,
        )
        page = _trial_page(result) if html else None
    if json:
        typer.echo(result.to_json())
    else:
        _print_report(result)
    _write(page, html)
    if result.interrupted:
        typer.echo("Interrupted: the figures are of the steps taken so far.", err=True)
        raise typer.Exit(code=130)


def _trained(
    name: str | None,
    data: str | None,
    *,
    steps: int,
    batch_size: int,
    seq_len: int | None,
    dtype: Dtype | None,
    seeds: range,
    compiled: bool,
    gpu_memory: int | None,
) -> Trial:
    try:
        import torch

        from invact import patchers
        from invact.simulation import Setting
        from invact.trial import COMPILED_WAYS, WAYS, train_in_ways
        from invact.trial_data import DataError
        from invact.trial_task import NotTrainableError, make_task

        try:
            task = make_task(name, data, seq_len)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            dtype = dtype or (Dtype.bf16 if device.type == "cuda" else Dtype.fp32)
            ways = [*WAYS, *(COMPILED_WAYS if compiled else ())]
            with _progress(steps * len(seeds) * len(ways)) as on_step:
                return train_in_ways(
                    task,
                    steps=steps,
                    batch_size=batch_size,
                    seeds=seeds,
                    ways=ways,
                    setting=Setting(device, None if dtype is Dtype.fp32 else _torch_dtype(dtype.value)),
                    memory_bytes=gpu_memory,
                    on_step=on_step,
                )
        except (
            DataError,
            NotTrainableError,
            patchers.ModelNameError,
            patchers.MissingLibraryError,
            patchers.InputSizeError,
        ) as error:
            _fail(str(error))
    except KeyboardInterrupt:
        typer.echo("Interrupted before every way had taken a step: there is nothing to report.", err=True)
        raise typer.Exit(code=130) from None


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error if that is a terminal; yields what to call with the way after every step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        training = bar.add_task("preparing", total=total)
        yield lambda way: bar.update(training, advance=1, description=way)


def _trial_page(result: Trial) -> Page:
    from invact.page import trial_page

    return trial_page(result, _command())


def _plan_page(report: Report, layers: list[Layer], fit: Fit | None) -> Page:
    from invact.page import plan_page

    return plan_page(report, layers, _command(), str(fit or ""))


def _command() -> str:
    """As it was typed."""
    return shlex.join(["invact", *sys.argv[1:]])


def _check_writable(path: Path | None) -> None:
    """Before the work, not after it."""
    if path is None:
        return
    from invact.page import MissingPageLibraryError, require_page_libraries

    try:
        require_page_libraries()
        path.open("a").close()
    except MissingPageLibraryError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{path} can not be written: {error.strerror}. Pass another file to --html.")


def _write(page: Page | None, path: Path | None) -> None:
    if page is not None and path is not None:
        path.write_text(page.html(), encoding="utf-8")
        typer.echo(f"Wrote {path}.", err=True)


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _size_in_words(inputs: dict[str, Any] | tuple[Any, ...]) -> str:
    """As "32 x 512 tokens"."""
    tensors = list(inputs.values() if isinstance(inputs, dict) else inputs)
    samples = dict.fromkeys(_sample_in_words(tensor) for tensor in tensors)
    return f"{tensors[0].shape[0]} x {' + '.join(samples)}"


def _sample_in_words(tensor: torch.Tensor) -> str:
    if not tensor.is_floating_point():
        return f"{tensor.shape[1]} tokens"
    unit = {2: "samples", 3: "spectrogram"}.get(tensor.ndim, "pixels")
    size = tensor.shape[1:] if tensor.ndim < 4 else tensor.shape[-2:]
    return f"{'x'.join(map(str, size))} {unit}"


def _print_report(report: Report | Trial) -> None:
    from rich.console import Console

    report.print(Console(width=None if sys.stdout.isatty() else 120))


@contextlib.contextmanager
def _library_chatter_on_stderr() -> Iterator[None]:
    """Standard output is the report's alone; of what libraries log and warn, only errors are shown."""
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(code=2)
