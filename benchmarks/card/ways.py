"""Ways to take a training step besides those of `invact.bench.ways`, and which are compared."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import nn

from invact.bench.ways import Changed, Way, checkpointed, compiled, patched, stock
from invact.compiling.inductor import backend
from invact.planning.plans import decide
from invact.trial.selective import checkpoint_selectively

STOCK, INVACT, EXACT, INVERTING = "stock", "invact", "exact", "inverting"
CHECKPOINTING, SELECTIVE, LIGER = "checkpointing", "selective", "liger"
COMPILE, COMPILE_INVACT = "compile", "compile+invact"


def inverting(model: nn.Module, inputs: Any) -> Changed:
    """Activations are inverted as `patched` inverts them; nothing is derived and no norm is fused."""
    replace(decide(model, inputs), derives={}, norms={}).apply(model)
    return Changed(model)


def selectively_checkpointed(model: nn.Module, inputs: Any) -> Changed:
    """Every repeated block keeps its matrix products and attention, and makes the rest of its tensors again."""
    checkpoint_selectively(model)
    return Changed(model)


def eager_ways(model: nn.Module) -> dict[str, Way]:
    """By name, stock first; Liger's kernels where they are installed and know the model."""
    ways: dict[str, Way] = {
        STOCK: stock,
        INVACT: patched,
        EXACT: partial(patched, exact=True),
        INVERTING: inverting,
        CHECKPOINTING: checkpointed,
        SELECTIVE: selectively_checkpointed,
    }
    return ways | {LIGER: with_liger} if liger_knows(model) else ways


def compiled_ways(tiny: bool) -> dict[str, Way]:
    """As a user compiles, and with invact's backend, which needs no patch. From a plain checkout PyTorch does not find
    that one by its name."""
    ways: dict[str, Way] = {STOCK: stock, COMPILE: compiled, COMPILE_INVACT: partial(compiled, by=backend)}
    return ways | {COMPILE: partial(compiled, by="aot_eager")} if tiny else ways


# --- Liger --------------------------------------------------------------------------------------------


def liger_knows(model: nn.Module) -> bool:
    """Whether its kernels are here and are meant for the model."""
    return find_spec("liger_kernel") is not None and _model_type(model) == "mistral"


def with_liger(model: nn.Module, inputs: Any) -> Changed:
    """All its kernels but those of the loss, so that the same loss is compared."""
    from liger_kernel.transformers import apply_liger_kernel_to_mistral

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    source = vars(sys.modules[type(inner).__module__])
    before = dict(source)
    apply_liger_kernel_to_mistral(cross_entropy=False, fused_linear_cross_entropy=False, model=inner)
    theirs = {name: value for name, value in source.items() if before.get(name) is not value}
    source.update({name: before[name] for name in theirs})

    def forward(*arguments: Any, **named: Any) -> Any:
        with _in_place_of(source, theirs):
            return model(*arguments, **named)

    return Changed(forward)


@contextmanager
def _in_place_of(source: dict[str, Any], theirs: dict[str, Any]) -> Iterator[None]:
    """The names of the model's file that Liger sets for every model in the process, for the length of a block."""
    before = {name: source[name] for name in theirs}
    source.update(theirs)
    try:
        yield
    finally:
        source.update(before)


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)
