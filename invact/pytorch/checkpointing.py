"""How torch.utils.checkpoint runs its regions."""

from __future__ import annotations

from typing import Any

import torch.utils.checkpoint as torch_checkpoint

from invact.pytorch.version_check import found, names_missing

# torch.utils.checkpoint's regions: one class, and one generator, whose name differs between releases. `checkpoint`
# looks both up at each call. Without them regions are not counted, and sites inside them counted as keeping nothing.
CheckpointFunction: Any = found(torch_checkpoint, "CheckpointFunction")


def checkpoint_generator() -> str:
    """The name, in torch.utils.checkpoint, of the generator that runs a region that is not reentrant."""
    names = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
    name = next((name for name in names if hasattr(torch_checkpoint, name)), None)
    if name is None:
        raise names_missing(" and ".join(f"torch.utils.checkpoint.{name}" for name in names))
    return name


checkpoint_generator()  # at import, like the others
