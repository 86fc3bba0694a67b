"""What autograd keeps for backward, counted: by whom, made of what, and how little would do.

It knows no plan and changes nothing.
"""

from invact.ledger.entries import Entry, Key, Memory
from invact.ledger.ledger import Ledger

__all__ = ["Entry", "Key", "Ledger", "Memory"]
