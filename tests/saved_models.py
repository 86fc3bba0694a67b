"""Configurations in folders, as `invact trial` and its kin read them."""

from __future__ import annotations

import json
from pathlib import Path

TINY_GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 2}


def saved_gpt2(folder: Path, **fields: object) -> Path:
    """The folder of a small GPT-2 without dropout, with whatever fields besides."""
    sizes = {"vocab_size": 300, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "config.json").write_text(json.dumps({**TINY_GPT2, **sizes, **fields}))
    return folder / "gpt2"
