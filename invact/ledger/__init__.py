"""What autograd keeps for backward, counted: by whom, made of what, and how little would do.

It knows no plan and changes nothing.
"""

from invact.ledger.ledger import Entry, Key, Ledger, Memory

__all__ = ["Entry", "Key", "Ledger", "Memory"]
