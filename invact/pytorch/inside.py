"""What this folder leans on in PyTorch's inside: each private name, what for, and what breaks without.

What belongs to its compiler is in `invact.compiling.compiler_inside`. No other file names anything private of
PyTorch's. A PyTorch that has renamed one of them is met here, at import, with one sentence; nothing goes on with a
guess.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.modules import module as torch_module

Function = TypeVar("Function", bound=Callable[..., Any])


def names_missing(what: object) -> ImportError:
    return ImportError(
        f"invact leans on names inside PyTorch that PyTorch {torch.__version__} does not have: {what}. Install a newer "
        "invact, or a PyTorch between 2.8 and 2.14, with which this one was tried."
    )


def _found(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise names_missing(f"{getattr(owner, '__name__', owner)}.{name}") from error


try:
    # How a kernel lays its output out, given an input in part of a channels-last tensor, which is_contiguous does not
    # tell: a reshape after batch norm would be counted as a copy where it is none.
    # make_contiguous_strides_for: the layout of a copy that is made again; kernels would round differently in another.
    from torch._prims_common import make_contiguous_strides_for, suggest_memory_format

    # Simulated tensors, which a probe runs the model on: without them each probe would be a real forward pass.
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

    # A storage's identity, and whether it still lives: without it the ledger would count some storages twice.
    from torch.multiprocessing.reductions import StorageWeakRef

    # Modes that see every tensor operation: without them no time limit, no casts of weights told from activations.
    # is_traceable_wrapper_subclass tells tensors that hold others, such as DTensor: they would count as nothing.
    from torch.utils._python_dispatch import (
        TorchDispatchMode,
        _disable_current_modes,
        is_traceable_wrapper_subclass,
    )

    # Tensors in nested containers, whatever those are: inputs of models in dicts and data classes would be missed.
    from torch.utils._pytree import tree_leaves, tree_map_only
except ImportError as _error:
    raise names_missing(_error) from _error

# Whether torch.func (vmap, grad, jvp) is at work: inverted functions would give wrong gradients there.
transforms_active: Callable[[], bool] = _found(torch._C, "_are_functorch_transforms_active")

# Turns off what changes operations by their Python names, such as a default device: snapshots would land there.
_no_torch_function: Callable[[], Any] = _found(torch._C, "DisableTorchFunction")

# The attention that F names, before anybody patches that name: attention on a GPU could not be told from others.
stock_attention: Callable[..., Tensor] = _found(_found(torch._C, "_nn"), "scaled_dot_product_attention")

# Its kernels, by what they keep for backward: plans for a GPU would count an N x N matrix, or none.
flash_attention: Callable[..., Any] = _found(torch.ops.aten, "_scaled_dot_product_flash_attention")
efficient_attention: Callable[..., Any] = _found(torch.ops.aten, "_scaled_dot_product_efficient_attention")
math_attention: Callable[..., Any] = _found(torch.ops.aten, "_scaled_dot_product_attention_math")

# The operation behind a change of dtype: copies of weights under autocast would be counted as activations.
cast_operation: Any = _found(_found(torch.ops.aten, "_to_copy"), "default")

# How C++ asks for a fake tensor's device, twice as often as it runs an operator: each time the long way round.
device_query: Any = _found(_found(torch.ops.prim, "device"), "default")
_found(FakeTensorMode, "dispatch")

# The operator whose output needs no looking up, and the block in which operators take fake tensors for those on meta.
detach_operator: Any = torch.ops.aten.detach.default
on_meta: Any = in_kernel_invocation_manager

# nn.MultiheadAttention's function as PyTorch has it, which hides its operations from a mode: see `seen_by_modes`.
stock_multi_head_attention: types.FunctionType = _found(functional, "multi_head_attention_forward")

# torch.utils.checkpoint's regions: one class, and one generator, whose name differs between releases. `checkpoint`
# looks both up at each call. Without them regions are not counted, and sites inside them counted as keeping nothing.
CheckpointFunction: Any = _found(torch_checkpoint, "CheckpointFunction")


def checkpoint_generator() -> str:
    """The name, in torch.utils.checkpoint, of the generator that runs a region that is not reentrant."""
    names = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
    name = next((name for name in names if hasattr(torch_checkpoint, name)), None)
    if name is None:
        raise names_missing(" and ".join(f"torch.utils.checkpoint.{name}" for name in names))
    return name


def has_fused_rms_norm(device: torch.device) -> bool:
    """Whether `F.rms_norm` is one kernel there: on a GPU from PyTorch 2.9 on, whichever build plans for it."""
    return device.type == "cuda" and RELEASE >= (2, 9)


RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])
checkpoint_generator()  # at import, like the others
_all_modules_forward_hooks: dict[int, Any] = _found(torch_module, "_global_forward_hooks")
_found(forward_ad, "_current_level")
_found(Tensor, "_version")
_found(torch.UntypedStorage, "_cdata")
_found(cast_operation, "_schema")
_found(Tensor, "_backward_hooks")
_found(functional, "has_torch_function")
_found(torch.compiler, "_is_compiling_flag")

# Hooks on kept tensors set outside of ours: what is really kept must go through them, or they would not see it.
_top_hooks: Callable[[bool], Any] = _found(_found(torch._C, "_autograd"), "_top_saved_tensors_default_hooks")

_push_hooks: Callable[[Any, Any], None] = _found(torch._C._autograd, "_push_saved_tensors_default_hooks")
_pop_hooks: Callable[[], None] = _found(torch._C._autograd, "_pop_saved_tensors_default_hooks")

# What torch.func, and whoever else can not stand such hooks, enters: a model that does so inside could not be planned.
torch_graph: Any = torch.autograd.graph
_found(torch_graph, "disable_saved_tensors_hooks")

# Whether a node shows what hooks gave for a tensor that it keeps; 2.8 and 2.9 give it to the unpacking hook alone.
shows_what_is_kept: bool = hasattr(_found(torch._C._autograd, "SavedTensor"), "data")

# How many nodes the graphs of this thread have had so far, by which these PyTorches' nodes are told that kept something
# with our hooks: with somebody else's, asking would run a checkpointed region anew.
nodes_made: Callable[[], int] = _found(torch._C._autograd, "_get_sequence_nr")

# Whether such hooks may be set here: entering them where torch.func forbids it raises.
hooks_allowed: Callable[[], bool] = _found(torch._C._autograd, "_saved_tensors_hooks_is_enabled")

# The number of the backward pass that is running, or -1, and what is to be done at its end: a tensor that several want
# would be made for each of them, or held until the graph goes.
current_backward: Callable[[], int] = _found(torch._C, "_current_graph_task_id")
# The node of the graph that is running: what backward allocates could not be put down to a module.
current_node: Callable[[], Any] = _found(torch._C, "_current_autograd_node")
# Whether that pass leaves the graph for another one: what is asked for the last time could not go before its node does.
keeps_graph: Callable[[], bool] = _found(torch._C._autograd, "_get_current_graph_task_keep_graph")
# The function that starts a backward pass: whoever else asks for a kept tensor is code written in Python.
engine_call: types.FunctionType = _found(torch.autograd.graph, "_engine_run_backward")
_engine: Any = _found(torch.autograd.Variable, "_execution_engine")
when_backward_ends: Callable[[Callable[[], None]], None] = _found(_engine, "queue_callback")

# Whether autocast is on for any device, in one question: several would cost as much as a small recipe.
autocast_anywhere: Callable[[], bool] = _found(torch._C, "_is_any_autocast_enabled")


def outer_hooks() -> Any:
    """The innermost hooks on kept tensors, as (pack, unpack), or None."""
    return _top_hooks(False)


@contextmanager
def hooks_taken_off(ours: Callable[[Any], bool]) -> Iterator[None]:
    """Without the innermost hooks on kept tensors for the length of a block, as far as `ours` says so of their pack."""
    off: list[tuple[Any, Any]] = []
    while (hooks := outer_hooks()) is not None and ours(hooks[0]):
        off.append(hooks)
        _pop_hooks()
    try:
        yield
    finally:
        for hooks in reversed(off):
            _push_hooks(*hooks)


def current_stream(tensor: Tensor) -> int:
    """The stream of a tensor's device that work goes to: on another one a tensor may not be ready."""
    return int(torch._C._cuda_getCurrentRawStream(tensor.get_device())) if tensor.is_cuda and real(tensor) else 0


def real(tensor: Tensor) -> bool:
    """Whether there is memory behind it, which simulated tensors have not."""
    return type(tensor) is not FakeTensor


def accelerator_type() -> str:
    """The kind of accelerator of this PyTorch, "cuda" where it has none."""
    device = torch.accelerator.current_accelerator()
    return "cuda" if device is None else device.type


def hooks_on_all_modules() -> bool:
    """Whether forward hooks are registered for every module there is: what they change of an output would go unseen."""
    return bool(_all_modules_forward_hooks)


def forward_ad_active() -> bool:
    """Whether derivatives are taken forward: inverted functions would give none."""
    return bool(forward_ad._current_level >= 0)


def changes_in_place(tensor: Tensor) -> int:
    """How often a tensor was changed in place; an activation whose output is changed later must be kept."""
    return 0 if tensor.is_inference() else tensor._version


def storage_identity(tensor: Tensor) -> int:
    """What `StorageWeakRef.cdata` is, without making one: the recording of a pass asks for it at every operator."""
    identity: int = tensor.untyped_storage()._cdata
    return identity


def node_name(node: Any) -> str:
    """Of a node of the graph, asked of its class: a Function in Python may have set a name of its own on its `ctx`."""
    name: str = type(node).name(node)
    return name


def schema_of(operator: Any) -> Any:
    """An operator's name and arguments, and which of them it changes in place; None of one of higher order."""
    return getattr(operator, "_schema", None)


def changed_arguments(operator: Any) -> list[int]:
    """The places of the arguments that an operator changes in place."""
    arguments = getattr(schema_of(operator), "arguments", [])
    return [n for n, each in enumerate(arguments) if each.alias_info is not None and each.alias_info.is_write]


@contextmanager
def modes_off() -> Iterator[None]:
    """Tensor operations in the block are real and as written: no mode sees them, no default device moves them."""
    with _no_torch_function(), _disable_current_modes():
        yield


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of a sparse tensor as they are stored; the public methods refuse what is not coalesced."""
    return tensor._indices(), tensor._values()


def plain_parts(tensor: Tensor) -> list[Tensor] | None:
    """The strided tensors that hold a tensor's numbers and say where they stand; None if it does not show them."""
    if tensor.layout is torch.sparse_coo:
        return list(sparse_parts(tensor))
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.layout is not torch.strided:
        return None
    if tensor.is_nested:
        return list(tensor.unbind())
    return [tensor.int_repr()] if tensor.is_quantized else [tensor]


def seen_by_modes(function: types.FunctionType) -> types.FunctionType:
    """A function of torch.nn.functional whose operations a mode sees, though it would go to the mode as a whole.

    Nothing of PyTorch's is changed: the copy has its own globals, in which it is told that there is no mode.
    """
    own_globals = {**function.__globals__, "has_torch_function": lambda values: False}
    copied = types.FunctionType(
        function.__code__, own_globals, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def constant_when_compiled(function: Function) -> Function:
    """torch.compiler.assume_constant_result, which would import the compiler: a graph holds what the function returns.

    Without it a function that is cached is traced line by line, and the graph breaks there.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def as_if_compiling() -> Iterator[None]:
    """torch.compiler.is_compiling() is true: models that ask build masks, say, that they leave out elsewhere.

    PyTorch has one such flag for all threads, and sets it itself while it compiles.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


__all__ = [
    "RELEASE",
    "CheckpointFunction",
    "FakeTensor",
    "FakeTensorMode",
    "StorageWeakRef",
    "TorchDispatchMode",
    "accelerator_type",
    "as_if_compiling",
    "autocast_anywhere",
    "cast_operation",
    "changed_arguments",
    "changes_in_place",
    "checkpoint_generator",
    "constant_when_compiled",
    "current_backward",
    "current_node",
    "current_stream",
    "detach_operator",
    "device_query",
    "efficient_attention",
    "engine_call",
    "flash_attention",
    "forward_ad_active",
    "has_fused_rms_norm",
    "hooks_allowed",
    "hooks_on_all_modules",
    "hooks_taken_off",
    "is_traceable_wrapper_subclass",
    "keeps_graph",
    "make_contiguous_strides_for",
    "math_attention",
    "modes_off",
    "names_missing",
    "nodes_made",
    "on_meta",
    "outer_hooks",
    "plain_parts",
    "schema_of",
    "seen_by_modes",
    "shows_what_is_kept",
    "sparse_parts",
    "stock_attention",
    "stock_multi_head_attention",
    "storage_identity",
    "suggest_memory_format",
    "torch_graph",
    "transforms_active",
    "tree_leaves",
    "tree_map_only",
    "when_backward_ends",
]
