"""Tensors in nested containers, whatever those are."""

from __future__ import annotations

from invact.pytorch.version_check import names_missing

try:
    # Inputs of models in dicts and data classes would be missed.
    from torch.utils._pytree import tree_leaves, tree_map_only
except ImportError as _error:
    raise names_missing(_error) from _error
__all__ = ["tree_leaves", "tree_map_only"]
