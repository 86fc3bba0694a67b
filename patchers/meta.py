"""Models built as shapes only: parameters on the meta device, so size and initialisation cost nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def built_on_meta(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The model that `build` makes, its parameters of that dtype and on the meta device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError as error:
        # Some read a number off a tensor as they are built: ConvNeXt and Swin of transformers 4.48. PyTorch then says
        # that this can not be done with meta tensors. Any other error would come again, after all weights were made.
        if "meta" not in str(error):
            raise
        return build().to("meta")
    finally:
        torch.set_default_dtype(before)
