"""What autograd keeps for backward, counted: by whom, made of what, and how little would do.

`ledger` counts by module, `kept_storages` without any; `computed` records what made what, from which `floor` tells the
least that must be kept and `own_loss` what is a loss's. It knows no plan and changes nothing.
"""

from invact.ledger.entries import Entry, Key, Memory
from invact.ledger.ledger import Ledger

__all__ = ["Entry", "Key", "Ledger", "Memory"]
