"""A PyTorch that lacks a name of its inside that invact leans on is met with one sentence."""

import importlib
import pathlib
import re
import sys

import pytest
import torch
import torch._prims_common
import torch._subclasses.fake_tensor
import torch.multiprocessing.reductions
import torch.utils._python_dispatch
import torch.utils._pytree
import torch.utils.checkpoint
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import invact
from invact.pytorch.attention import seen_by_modes, stock_attention
from invact.pytorch.checkpointing import checkpoint_generator
from invact.pytorch.tensors import sparse_parts

NAMES = {
    "FakeTensor": ("fake_tensors", torch._subclasses.fake_tensor),
    "FakeTensorMode": ("fake_tensors", torch._subclasses.fake_tensor),
    "suggest_memory_format": ("tensors", torch._prims_common),
    "make_contiguous_strides_for": ("tensors", torch._prims_common),
    "StorageWeakRef": ("tensors", torch.multiprocessing.reductions),
    "TorchDispatchMode": ("modes", torch.utils._python_dispatch),
    "is_traceable_wrapper_subclass": ("tensors", torch.utils._python_dispatch),
    "_disable_current_modes": ("modes", torch.utils._python_dispatch),
    "tree_leaves": ("containers", torch.utils._pytree),
    "tree_map_only": ("containers", torch.utils._pytree),
    "_are_functorch_transforms_active": ("circumstances", torch._C),
    "DisableTorchFunction": ("modes", torch._C),
    "scaled_dot_product_attention": ("attention", torch._C._nn),
    "multi_head_attention_forward": ("attention", F),
    "has_torch_function": ("attention", F),
    "CheckpointFunction": ("checkpointing", torch.utils.checkpoint),
    "_current_level": ("circumstances", forward_ad),
}
"""Names of PyTorch's: the file of invact/pytorch that leans on each, and where PyTorch has it."""


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_pytorch_no_longer_has_is_told_at_import(name, monkeypatch):
    file, owner = NAMES[name]
    with monkeypatch.context() as patch:
        patch.delattr(owner, name)
        patch.delitem(sys.modules, f"invact.pytorch.{file}", raising=False)
        with pytest.raises(ImportError) as error:
            importlib.import_module(f"invact.pytorch.{file}")
    message = str(error.value)
    assert name in message
    assert torch.__version__ in message
    assert "Install a newer invact, or a PyTorch between" in message


@pytest.mark.parametrize("name", ["get_default_op_list", "min_cut_rematerialization_partition"])
def test_a_name_that_pytorchs_compiler_no_longer_has_is_told_by_who_compiles(name, monkeypatch):
    partitioners = importlib.import_module("torch._functorch.partitioners")
    with monkeypatch.context() as patch:
        patch.delattr(partitioners, name)
        patch.delitem(sys.modules, "invact.compiling.compiler_inside", raising=False)
        with pytest.raises(ImportError, match=name):
            importlib.import_module("invact.compiling.compiler_inside")


def test_a_generator_of_checkpointing_with_an_unknown_name_is_told(monkeypatch):
    for name in ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator"):
        monkeypatch.delattr(torch.utils.checkpoint, name, raising=False)
    with pytest.raises(ImportError, match="_checkpoint_without_reentrant_generator"):
        checkpoint_generator()


INVACT = pathlib.Path(invact.__file__).parent
FILES = [file.relative_to(INVACT).as_posix() for file in INVACT.rglob("*.py") if file.parent.name != "pytorch"]
NOT_LEANED_ON = {
    "torch._subclasses",
    "torch._inductor",
}  # the name of a log, and a message
# Read of every tensor that is kept, where one call more would tell; and an operator called by its name.
ALSO_IN_ROOMS = {"deriving": {"._version", "._cdata", "torch._weight_norm_interface"}, "swapping": {"._version"}}


@pytest.mark.parametrize("file", sorted({*FILES} - {"compiling/compiler_inside.py"}))
def test_other_files_lean_on_it_alone(file):
    private = re.findall(r"torch(?:\.\w+)*\._[a-zA-Z]\w*|\._cdata\b|\._version\b", (INVACT / file).read_text())
    may = NOT_LEANED_ON | ALSO_IN_ROOMS.get(file.partition("/")[0], set())
    assert [name for name in private if name not in may] == []


def test_a_sparse_tensor_that_is_not_coalesced_shows_its_parts():
    tensor = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,))
    assert [part.numel() for part in sparse_parts(tensor)] == [2, 2]


def test_a_mode_sees_into_the_attention_of_pytorch():
    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.multi_head_attention_forward:
                with self:
                    return seen_by_modes(func)(*args, **(kwargs or {}))
            names.append(func)
            return func(*args, **(kwargs or {}))

    names, x = [], torch.randn(2, 5, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    expected = attention(x, x, x, need_weights=False)[0]
    with Seen():
        y = attention(x, x, x, need_weights=False)[0]
    assert stock_attention in names
    assert torch.equal(y, expected)
