"""Which of PyTorch's operators make roots, of which kind, and which only move memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from invact.pytorch.operators import changed_arguments, schema_of

RESIDUAL_SUMS = "residual sums"
"""Sums of what comes of different roots: to make the sum again, both summands would have to be kept in its stead."""

STATISTICS = "norm statistics"
RANDOM = "random numbers"
INPUTS = "inputs"
CONSTANTS = "constants"


@dataclass(frozen=True)
class Rule:
    """What is known of one operator, overload by overload.

    Attributes:
        made_by: the kind of root that it makes, or None.
        changes: the positions of the arguments that it changes in place; `changes_named` the keywords.
        later_outputs: the kind of root that its outputs after the first are, if they differ from the first.
        sums: whether it adds its first argument to the others.
        reduces: whether it reduces, over the dimensions that the argument at `dims_at` names.
        overwrites: whether nothing is left of what the changed argument held.
    """

    operator: str
    made_by: str | None
    changes: tuple[int, ...]
    changes_named: tuple[str, ...]
    later_outputs: str | None
    sums: bool
    reduces: bool
    dims_at: int | None
    overwrites: bool

    def leaves_rows(self, args: tuple[Any, ...]) -> bool:
        """Whether the reduction does not go over the first dimension, which has the samples or the tokens."""
        if self.dims_at is None or self.dims_at >= len(args):
            return False
        dims = args[self.dims_at]
        dims = [dims] if isinstance(dims, int) else dims
        return bool(dims) and all(dim % max(args[0].dim(), 1) for dim in dims)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ROOTS = {
    "matrix products": _names(
        "mm addmm bmm baddbmm addbmm mv addmv dot vdot addr linear linalg_matmul mkldnn_linear _int_mm _scaled_mm "
        "_grouped_mm _scaled_grouped_mm _addmm_activation _weight_int8pack_mm _weight_int4pack_mm _sparse_mm "
        "_trilinear _cdist_forward _euclidean_dist"
    ),
    "convolutions": _names(
        "convolution _convolution convolution_overrideable cudnn_convolution cudnn_convolution_transpose "
        "mkldnn_convolution miopen_convolution slow_conv3d_forward conv_depthwise3d _conv_depthwise2d"
    ),
    "attention": _names(
        "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_fused_attention_overrideable _flash_attention_forward _efficient_attention_forward "
        "_cudnn_attention_forward flex_attention"
    ),
    "embeddings and indices": _names(
        "embedding _embedding_bag index _unsafe_index index_select gather take scatter scatter_add scatter_reduce "
        "index_put index_add index_copy index_fill masked_select masked_scatter nonzero topk sort argsort argmax "
        "argmin max min kthvalue median mode unique_dim _unique2 unique_consecutive searchsorted bucketize histc "
        "bincount cumsum cumprod cummax cummin"
    ),
    CONSTANTS: _names(
        "arange zeros ones full eye linspace logspace scalar_tensor zeros_like ones_like full_like new_zeros new_ones "
        "new_full tril_indices triu_indices lift lift_fresh lift_fresh_copy empty empty_like empty_strided "
        "empty_permuted new_empty new_empty_strided"
    ),
}
"""Kinds of roots by operator. What is in neither this table nor the next ones is a root of its own kind."""

UNWRITTEN = _names("empty empty_like empty_strided empty_permuted new_empty new_empty_strided")

_SUMS = _names("add sub rsub addcmul addcdiv lerp")

_REDUCTIONS = _names("sum mean var var_mean std std_mean amax amin norm linalg_vector_norm logsumexp all any prod")

_ALONG_A_ROW = _names("_softmax _log_softmax _safe_softmax")

_NORMS = _names(
    "native_layer_norm native_group_norm _fused_rms_norm native_batch_norm _native_batch_norm_legit "
    "_native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_no_update cudnn_batch_norm "
    "miopen_batch_norm"
)
"""Their first output is made again from the input; the others are statistics, which are small and kept."""

_MOVING = _names(
    "_to_copy copy clone cat stack constant_pad_nd fill zero masked_fill where repeat flip roll tril triu diag_embed "
    "slice_scatter select_scatter diagonal_scatter as_strided_scatter pixel_shuffle pixel_unshuffle channel_shuffle "
    "native_channel_shuffle _reshape_copy view_copy expand_copy permute_copy transpose_copy slice_copy split_copy "
    "split_with_sizes_copy unbind_copy squeeze_copy unsqueeze_copy t_copy alias_copy detach_copy as_strided_copy "
    "unfold_copy im2col hardswish _prelu_kernel prelu glu log_sigmoid_forward complex polar real imag _conj "
    "_conj_physical resolve_conj contiguous _weight_norm_interface"
)
"""Operators that only move memory though PyTorch does not call them pointwise."""

_OVERWRITING = _names("copy fill zero")


@functools.cache
def rule_of(func: Any) -> Rule:
    schema = schema_of(func)
    if schema is None:  # an operator of higher order, such as flex_attention
        name = str(getattr(func, "__name__", func))
        return Rule(_plain(name), _made_by(name, func), (), (), None, False, False, None, False)
    name = schema.name.removeprefix("aten::")  # an operator of somebody else's is in none of the tables
    name = name if name.endswith("__") else name.removesuffix("_")
    arguments = schema.arguments
    writes = changed_arguments(func)
    if torch.Tag.inplace_view in getattr(func, "tags", ()):  # it changes shape or strides, and no number
        writes = []
    return Rule(
        operator=_plain(name),
        made_by=_made_by(name, func),
        changes=tuple(writes),
        changes_named=tuple(arguments[n].name for n in writes),
        later_outputs=STATISTICS if name in _NORMS else RANDOM if name == "native_dropout" else None,
        sums=name in _SUMS,
        reduces=name in _REDUCTIONS,
        dims_at=next((n for n, argument in enumerate(arguments) if argument.name == "dim"), None),
        overwrites=name in _OVERWRITING,
    )


def _plain(name: str) -> str:
    """An operator's name as people know it."""
    return "cast" if name == "_to_copy" else name.rpartition("::")[2].strip("_").removeprefix("native_")


def _made_by(name: str, func: Any) -> str | None:
    """The kind of root that an operator makes, whatever its arguments; None if it only moves memory."""
    tags = getattr(func, "tags", ())
    for kind, names in _ROOTS.items():
        if name in names and torch.Tag.pointwise not in tags:  # max of two tensors is, max along a dimension is not
            return kind
    if name in _MOVING or name in _NORMS or name in _ALONG_A_ROW or name == "native_dropout":
        return None
    if torch.Tag.nondeterministic_seeded in tags:
        return RANDOM
    return None if torch.Tag.pointwise in tags else other_kind(_plain(name))


def other_kind(operator: str) -> str:
    return f"other: {operator}"
