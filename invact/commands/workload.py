"""What `invact patch` is asked about: a model on meta, what it is given, and how it would be trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from invact.commands.adapters import Adapters
from invact.commands.options import torch_dtype
from invact.commands.output import fail
from invact.errors.own_errors import first_line, own_error

if TYPE_CHECKING:
    import torch
    from torch import nn

    from invact.planning.plans import Decided


@dataclass(frozen=True)
class Workload:
    """A model by name, what it is given, and how it would be trained."""

    name: str
    library: str | None
    batch_size: int
    seq_len: int | None
    image_size: int | None
    dtype: str
    autocast: str | None
    attention: str
    exact: bool
    few_bits: int | None
    adapters: Adapters | None
    loss: bool

    def decided(self) -> tuple[nn.Module, Any, Decided]:
        """The model on meta, its inputs, and what is decided for a GPU; fails where they can not be had."""
        from invact import patchers
        from invact.planning.plans import decide_for_device
        from invact.report.inputs import size_in_words

        try:
            loaded = _loaded(self.name, torch_dtype(self.dtype), self.library, self.image_size)
            title = [self.name, type(loaded).__name__, *([str(self.adapters)] if self.adapters else [])]
            model = self.adapters.put_into(loaded) if self.adapters else loaded
            inputs = self.inputs(model, self.batch_size)
        except patchers.RequestError as error:
            fail(str(error))
        precision = f"{self.dtype}, autocast {self.autocast}" if self.autocast else self.dtype
        try:
            decided = decide_for_device(
                model,
                inputs,
                autocast=torch_dtype(self.autocast) if self.autocast else None,
                attention=self.attention,
                exact=self.exact,
                few_bits=self.few_bits,
                title=" · ".join([*title, size_in_words(inputs), precision]),
            )
        except Exception:
            # A size that only the model itself can reject is bad input; anything else is a fault, with its traceback.
            given = _sizes_in_words(self.seq_len, self.image_size)
            why = own_error(lambda: _run_on_meta(model, inputs)) if given else None
            if why is None:
                raise
            _fail_for_sizes(self.name, given, why)
        return model, inputs, decided

    def inputs(self, model: nn.Module, batch_size: int) -> Any:
        from invact import patchers

        return patchers.example_inputs(model, batch_size, self.seq_len, self.image_size, loss=self.loss)


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

    from invact.pytorch.containers import tree_map_only

    on_meta = tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs)
    model(**on_meta) if isinstance(on_meta, dict) else model(*on_meta)


def _sizes_in_words(seq_len: int | None, image_size: int | None) -> str:
    sizes = {"--seq-len": seq_len, "--image-size": image_size}
    return " ".join(f"{option} {size}" for option, size in sizes.items() if size is not None)


def _fail_for_sizes(name: str, given: str, why: Exception) -> NoReturn:
    fail(f"{name} does not run with {given}: {first_line(why)}. Leave it out for the model's own size.")
