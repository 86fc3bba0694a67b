"""The ways of training that a trial compares, by name, and what each does to a model."""

from __future__ import annotations

from dataclasses import dataclass

BASELINE, INVACT, CHECKPOINTING, BOTH = "baseline", "invact", "checkpointing", "invact+checkpointing"
COMPILE, INVACT_COMPILE = "compile", "invact+compile"
EXACT, SELECTIVE, FIT, COMPRESSION = "exact", "selective", "fit", "compression"
FEW_BITS = {f"fewbit-{bits}": bits for bits in (1, 2, 3, 4)}

WAYS = (BASELINE, INVACT, CHECKPOINTING, BOTH)
COMPILED_WAYS = (COMPILE, INVACT_COMPILE)
ON_DEMAND = (EXACT, SELECTIVE, FIT, COMPRESSION, *FEW_BITS)


@dataclass(frozen=True)
class Way:
    """What a way does to a model; the baseline does nothing, nor does compression, which is done between processes.

    Attributes:
        patched: by `invact.patch`.
        exact: nothing is inverted in that, whatever else is asked for.
        checkpointed: by the switch of the model's library.
        compiled: by torch.compile.
        selective: PyTorch's selective checkpointing stands around the repeated blocks.
        fits: by `invact.fit`, for the memory that was named.
        few_bits: of the coarse derivatives at every site; None where they are not coarse.
    """

    patched: bool = False
    exact: bool = False
    checkpointed: bool = False
    compiled: bool = False
    selective: bool = False
    fits: bool = False
    few_bits: int | None = None

    @property
    def ours(self) -> bool:
        """Whether it is one of those that invact is for."""
        return self.patched or self.fits


_BY_NAME = {
    BASELINE: Way(),
    INVACT: Way(patched=True),
    CHECKPOINTING: Way(checkpointed=True),
    BOTH: Way(patched=True, checkpointed=True),
    COMPILE: Way(compiled=True),
    INVACT_COMPILE: Way(patched=True, compiled=True),
    EXACT: Way(patched=True, exact=True),
    SELECTIVE: Way(selective=True),
    FIT: Way(fits=True),
    COMPRESSION: Way(),
    **{name: Way(few_bits=bits) for name, bits in FEW_BITS.items()},
}


def way_called(name: str) -> Way:
    """What a way does, by its name.

    Raises:
        ValueError: there is none of that name.

    Example:
        >>> way_called("invact+compile")
        Way(patched=True, exact=False, checkpointed=False, compiled=True, selective=False, fits=False, few_bits=None)
    """
    if name not in _BY_NAME:
        raise ValueError(f"There is no way of training called {name!r}. There are: {', '.join(_BY_NAME)}.")
    return _BY_NAME[name]
