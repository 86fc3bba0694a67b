"""invact: neural networks that train in less memory: what autograd keeps for backward, they keep once.

import invact
report = invact.patch(model)   # before training; in place
print(report)
"""

from __future__ import annotations

import random
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invact import functional, nn
    from invact.callback import InvActCallback as InvActCallback
    from invact.fitting.choosing import DoesNotFitError
    from invact.fitting.optimizers import NotSimulatedError
    from invact.patching import fit, patch, patched, unpatch
    from invact.planning.plans import plan
    from invact.probing.memory_kept import activation_memory
    from invact.report.records import Site
    from invact.report.report import Report

__version__ = "0.2.0"

# Without InvActCallback, which needs transformers: `from invact import *` must do without.
__all__ = [
    "DoesNotFitError",
    "NotSimulatedError",
    "Report",
    "Site",
    "activation_memory",
    "fit",
    "functional",
    "nn",
    "patch",
    "patched",
    "plan",
    "unpatch",
]

# Loaded at first use: `invact --help` need not wait for torch.
_HOME = {
    "DoesNotFitError": "invact.fitting.choosing",
    "InvActCallback": "invact.callback",
    "NotSimulatedError": "invact.fitting.optimizers",
    "Report": "invact.report",
    "Site": "invact.report",
    "activation_memory": "invact.probing.memory_kept",
    "fit": "invact.patching",
    "patch": "invact.patching",
    "patched": "invact.patching",
    "plan": "invact.planning",
    "unpatch": "invact.patching",
}


def __getattr__(name: str) -> Any:
    if name in ("functional", "nn"):
        return _loaded(f"invact.{name}")
    if name in _HOME:
        return getattr(_loaded(_HOME[name]), name)
    raise AttributeError(f"module 'invact' has no attribute {name!r}")


def _loaded(module: str) -> Any:
    """The module; rich, with which reports are printed, draws a random number when it is loaded."""
    state = random.getstate()
    try:
        return import_module(module)
    finally:
        random.setstate(state)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
