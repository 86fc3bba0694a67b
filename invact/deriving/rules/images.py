"""Resampled and rearranged images: each number is taken from a few that lie together."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from invact.deriving.handles import Derived
from invact.deriving.rules.pointwise import pointwise
from invact.deriving.rules.registry import Find, Node, register

aten = torch.ops.aten


register("AvgPool2DBackward0")(
    pointwise(aten.avg_pool2d, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
)
register("ChannelShuffleBackward0")(pointwise(aten.channel_shuffle, "groups"))
register("Im2ColBackward0")(pointwise(aten.im2col, "kernel_size", "dilation", "padding", "stride"))
register("PixelShuffleBackward0")(pointwise(F.pixel_shuffle, "upscale_factor"))
register("PixelUnshuffleBackward0")(pointwise(F.pixel_unshuffle, "downscale_factor"))
register("UpsampleNearest1DBackward0")(pointwise(aten.upsample_nearest1d, "output_size", "scales"))
register("UpsampleNearest2DBackward0")(pointwise(aten.upsample_nearest2d, "output_size", "scales_h", "scales_w"))
register("UpsampleNearestExact2DBackward0")(
    pointwise(aten._upsample_nearest_exact2d, "output_size", "scales_h", "scales_w")
)
register("UpsampleNearest3DBackward0")(
    pointwise(aten.upsample_nearest3d, "output_size", "scales_d", "scales_h", "scales_w")
)


_BILINEAR = pointwise(aten.upsample_bilinear2d, "output_size", "align_corners", "scales_h", "scales_w")


@register("UpsampleBilinear2DBackward0")
def bilinear(node: Node, number: int, find: Find) -> Derived | None:
    """On a GPU it does not give the same bits twice, seen on an H200 with torch 2.11."""
    return None if node._input_metadata[0].device.type == "cuda" else _BILINEAR(node, number, find)
