"""The command line: `invact patch --model NAME` plans for training on a GPU and prints what is saved.

Only typer is imported here: torch and the model libraries wait until a command needs them.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from invact import __version__

if TYPE_CHECKING:
    import torch

    from invact.report import Report

DEFAULT_BATCH_SIZE = 32


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
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """Dry run: what patching the model would save in training on a GPU. Needs neither the GPU nor weights."""
    with _library_chatter_on_stderr():
        report = _report(
            model,
            library=library and library.value,
            batch_size=batch_size,
            seq_len=seq_len,
            image_size=image_size,
            dtype=(dtype or (Dtype.fp32 if autocast else Dtype.bf16)).value,
            autocast=autocast and autocast.value,
            attention=attention.value,
        )
    if json:
        typer.echo(report.to_json())
    else:
        _print_report(report)


def _report(
    name: str,
    *,
    library: str | None,
    batch_size: int,
    seq_len: int | None,
    image_size: int | None,
    dtype: str,
    autocast: str | None,
    attention: str,
) -> Report:
    from invact import patchers
    from invact.planning import plan_for_device

    precision = f"{dtype}, autocast {autocast}" if autocast else dtype
    try:
        model = patchers.load(name, _torch_dtype(dtype), library=library, image_size=image_size)
        inputs = patchers.example_inputs(model, batch_size, seq_len, image_size)
        return plan_for_device(
            model,
            inputs,
            autocast=_torch_dtype(autocast) if autocast else None,
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


def _print_report(report: Report) -> None:
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
