"""What the operators of a forward pass made, of what, and which of it only moving memory would make again.

A forward pass is a graph of values: what a storage holds between two changes. Some values can not be made again without
a matrix product, or not at all: the roots. The others can, from what their operator read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invact.errors.own_errors import users_call
from invact.ledger.ledger import Key, dense_parts
from invact.pytorch.modes import TorchDispatchMode
from invact.pytorch.operators import schema_of
from invact.pytorch.tensors import StorageWeakRef, storage_identity

RESIDUAL_SUMS = "residual sums"
"""Sums of what comes of different roots: to make the sum again, both summands would have to be kept in its stead."""

STATISTICS = "norm statistics"
RANDOM = "random numbers"
INPUTS = "inputs"
_CONSTANTS = "constants"


@dataclass(slots=True)
class Value:
    """What one storage holds between two changes in place.

    Attributes:
        nbytes: of the whole storage; an eighth where it holds bools, since those can be kept in bits.
        operator: its plain name, such as "gelu"; "" for what was there before the pass.
        made_by: what kind of root this is, such as "matrix products"; None of what only moving memory makes again.
        reads: the values from which it is made again, by number, those that cost something; of roots, only a
            residual sum has them.
        roots: the roots it comes of, one bit each.
    """

    nbytes: int
    operator: str
    made_by: str | None
    reads: tuple[int, ...]
    roots: int
    gradient: bool = False  # whether gradients flow back through it
    unwritten: bool = False  # fresh from torch.empty


class Computed(TorchDispatchMode):
    """Records what the operators of a forward pass made, and of what; it keeps no tensor alive.

    Args:
        weights: parameters and buffers, which are there anyway: what comes of them alone costs nothing to make again.

    Example:
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()), torch.ones(4, 8)
        >>> with Computed(model.parameters()) as computed:
        ...     y = model(x)
        >>> [(value.operator, value.made_by) for value in computed.values[2:]]
        [('', 'inputs'), ('addmm', 'matrix products'), ('gelu', None)]
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.values: list[Value] = []
        self.changed_unseen = ""  # an operator that changed what autograd had recorded, and was not recorded itself
        self._in_graph: set[Key] = set()
        self._of_gradients = 0  # the roots through which gradients flow back, one bit each
        self._now: dict[Key, int] = {}  # the number of the value that each storage holds
        # While there is a weak reference, no other storage gets the identity.
        self._identities: list[StorageWeakRef] = []
        for tensor in weights:
            for part in dense_parts(tensor):
                self._put(part, Value(0, "", None, (), 0, gradient=tensor.requires_grad))
        self._first = len(self.values)  # of those that are no weights

    def number(self, key: Key) -> int | None:
        """Which of `values` a storage holds now; None if no operator has met it."""
        return self._now.get(key)

    def is_weight(self, key: Key) -> bool:
        """Whether a storage holds a parameter or a buffer as it was before the pass."""
        number = self._now.get(key)
        return number is not None and number < self._first

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = users_call(func, *args, **kwargs)
        rule = _rule(func)
        new = [(n, part) for n, part in enumerate(_parts(out)) if storage_identity(part) not in self._now]
        written = [args[n] for n in rule.changes if n < len(args)]
        written += [kwargs.get(name) for name in rule.changes_named]
        changed = _parts(written)
        if not new and not changed:  # a view, or something that only looks
            return out
        if changed and not self.changed_unseen and self._is_unseen(written):
            self.changed_unseen = rule.operator + "_"
        # Fresh noise and zeros shaped like something are filled in place, and integers have no gradients.
        may_be_in_graph = torch.is_grad_enabled() and rule.made_by not in (_CONSTANTS, RANDOM)
        if may_be_in_graph and _needs_gradient([*args, *kwargs.values()]):
            parts = [*changed, *(part for _, part in new)]
            self._in_graph.update(storage_identity(part) for part in parts if part.is_floating_point())
        self._record(rule, args, kwargs, new, changed)
        return out

    def _is_unseen(self, written: Any) -> bool:
        """Whether an operator writes into what autograd has recorded, past autograd."""
        known = any(storage_identity(part) in self._in_graph for part in _parts(written))
        return known and not (torch.is_grad_enabled() and _needs_gradient(written))

    def _record(
        self,
        rule: _Rule,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        new: list[tuple[int, Tensor]],
        changed: list[Tensor],
    ) -> None:
        keys = {storage_identity(part) for part in changed}
        read = [self._read(part, rule, keys) for arg in (*args, *kwargs.values()) for part in _parts(arg)]
        reads = [number for number in dict.fromkeys(read) if number is not None]
        kind = self._kind(rule, args)
        statistics: list[int] = []
        # The last output first: a norm's first one is made again with its statistics, dropout's with its mask.
        for n, part in reversed(new):
            if storage_identity(part) in self._now:  # a view of an input, first met here
                continue
            if n and rule.later_outputs is not None:
                statistics.append(self._put_root(part, rule.operator, rule.later_outputs, reads))
            else:
                self._put_output(part, rule.operator, kind, [*reads, *statistics])
        for part in changed:
            self._put_output(part, rule.operator, kind, reads)

    def _read(self, part: Tensor, rule: _Rule, changed: set[Key]) -> int | None:
        """The number of the value that an operator reads; None if it only writes there."""
        key = storage_identity(part)
        number = self._now.get(key)
        if number is None:  # there before the pass: an input, or a tensor that the model holds by itself
            return self._put_root(part, "", INPUTS, [])
        value = self.values[number]
        if key in changed and (value.unwritten or (rule.overwrites and _is_whole(part))):
            return None
        if value.unwritten:  # not by an operator of PyTorch's, but by now somebody's kernel has
            return self._put_root(part, value.operator, _other(value.operator), [])
        return number

    def _kind(self, rule: _Rule, args: tuple[Any, ...]) -> str | None:
        """What kind of root the operator makes of these arguments, or None."""
        if rule.reduces:
            return None if rule.leaves_rows(args) else _other(rule.operator)
        if rule.sums:
            one, other = self._roots_of_gradients(args[:1]), self._roots_of_gradients(args[1:])
            return None if one & other in (one, other) else RESIDUAL_SUMS
        return rule.made_by

    def _roots_of_gradients(self, args: tuple[Any, ...]) -> int:
        roots = 0
        for arg in args:
            for part in _parts(arg):
                roots |= self.values[self._now[storage_identity(part)]].roots
        return roots & self._of_gradients

    def _put_output(self, part: Tensor, operator: str, kind: str | None, reads: list[int]) -> None:
        if kind is not None:
            self._put_root(part, operator, kind, reads)
            return
        roots = 0
        for number in reads:
            roots |= self.values[number].roots
        gradient = any(self.values[number].gradient for number in reads)
        self._put(part, Value(_nbytes(part), operator, None, self._costly(reads), roots, gradient))

    def _put_root(self, part: Tensor, operator: str, kind: str, reads: list[int]) -> int:
        if kind == _CONSTANTS:
            return self._put(part, Value(0, operator, None, (), 0, unwritten=operator in _UNWRITTEN))
        gradient = part.requires_grad or (kind != RANDOM and any(self.values[n].gradient for n in reads))
        bit = 1 << len(self.values)
        if gradient:
            self._of_gradients |= bit
        summands = self._costly(reads) if kind == RESIDUAL_SUMS else ()
        return self._put(part, Value(_nbytes(part), operator, kind, summands, bit, gradient))

    def _costly(self, reads: list[int]) -> tuple[int, ...]:
        return tuple(number for number in reads if self.values[number].roots)

    def _put(self, part: Tensor, value: Value) -> int:
        key = storage_identity(part)
        if key not in self._now:
            self._identities.append(StorageWeakRef(part.untyped_storage()))
        self._now[key] = len(self.values)
        self.values.append(value)
        return len(self.values) - 1


# --- which operators make what ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
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
    _CONSTANTS: _names(
        "arange zeros ones full eye linspace logspace scalar_tensor zeros_like ones_like full_like new_zeros new_ones "
        "new_full tril_indices triu_indices lift lift_fresh lift_fresh_copy empty empty_like empty_strided "
        "empty_permuted new_empty new_empty_strided"
    ),
}
"""Kinds of roots by operator. What is in neither this table nor the next ones is a root of its own kind."""

_UNWRITTEN = _names("empty empty_like empty_strided empty_permuted new_empty new_empty_strided")

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
def _rule(func: Any) -> _Rule:
    schema = schema_of(func)
    if schema is None:  # an operator of higher order, such as flex_attention
        name = str(getattr(func, "__name__", func))
        return _Rule(_plain(name), _made_by(name, func), (), (), None, False, False, None, False)
    name = schema.name.removeprefix("aten::")  # an operator of somebody else's is in none of the tables
    name = name if name.endswith("__") else name.removesuffix("_")
    arguments = schema.arguments
    writes = [n for n, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]
    if torch.Tag.inplace_view in getattr(func, "tags", ()):  # it changes shape or strides, and no number
        writes = []
    return _Rule(
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
    return None if torch.Tag.pointwise in tags else _other(_plain(name))


def _other(operator: str) -> str:
    return f"other: {operator}"


def _parts(arg: Any) -> list[Tensor]:
    """The tensors with a storage inside an argument or a result."""
    if isinstance(arg, Tensor):
        return list(dense_parts(arg))
    if isinstance(arg, (tuple, list)):
        return [part for item in arg for part in _parts(item)]
    return []


def _needs_gradient(arg: Any) -> bool:
    """Whether one of the tensors in an argument does; the numbers inside a subclass do not say."""
    if isinstance(arg, Tensor):
        return arg.requires_grad
    return isinstance(arg, (tuple, list)) and any(_needs_gradient(item) for item in arg)


def _nbytes(part: Tensor) -> int:
    nbytes = part.untyped_storage().nbytes()
    return -(-nbytes // 8) if part.dtype is torch.bool else nbytes


def _is_whole(part: Tensor) -> bool:
    return part.numel() * part.element_size() == part.untyped_storage().nbytes()
