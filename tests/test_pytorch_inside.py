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

from invact.pytorch import inside as pytorch_inside

NAMES = {
    "FakeTensor": torch._subclasses.fake_tensor,
    "FakeTensorMode": torch._subclasses.fake_tensor,
    "suggest_memory_format": torch._prims_common,
    "make_contiguous_strides_for": torch._prims_common,
    "StorageWeakRef": torch.multiprocessing.reductions,
    "TorchDispatchMode": torch.utils._python_dispatch,
    "is_traceable_wrapper_subclass": torch.utils._python_dispatch,
    "_disable_current_modes": torch.utils._python_dispatch,
    "tree_leaves": torch.utils._pytree,
    "tree_map_only": torch.utils._pytree,
    "_are_functorch_transforms_active": torch._C,
    "DisableTorchFunction": torch._C,
    "scaled_dot_product_attention": torch._C._nn,
    "multi_head_attention_forward": F,
    "has_torch_function": F,
    "CheckpointFunction": torch.utils.checkpoint,
    "_current_level": forward_ad,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_pytorch_no_longer_has_is_told_at_import(name, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(NAMES[name], name)
        patch.delitem(sys.modules, "invact.pytorch.inside")
        with pytest.raises(ImportError) as error:
            importlib.import_module("invact.pytorch.inside")
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
        pytorch_inside.checkpoint_generator()


@pytest.mark.parametrize(
    "file",
    [
        *("ledger/ledger", "ledger/kept_storages", "simulation/simulation", "simulation/time_limit"),
        *("errors/arguments", "snapshot/noted", "snapshot/snapshot"),
        *("compiling/inductor", "compiling/compiled_bytes"),
    ],
)
def test_other_files_lean_on_it_alone(file):
    text = (pathlib.Path(pytorch_inside.__file__).parents[1] / f"{file}.py").read_text()
    private = re.findall(r"torch(?:\.\w+)*\._[a-zA-Z]\w*|\._cdata|\._version\b", text)
    # the name of a log, and a message that names where options are listed
    assert [name for name in private if name not in ("torch._subclasses", "torch._inductor")] == []


def test_a_sparse_tensor_that_is_not_coalesced_shows_its_parts():
    tensor = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,))
    assert [part.numel() for part in pytorch_inside.sparse_parts(tensor)] == [2, 2]


def test_a_mode_sees_into_the_attention_of_pytorch():
    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.multi_head_attention_forward:
                with self:
                    return pytorch_inside.seen_by_modes(func)(*args, **(kwargs or {}))
            names.append(func)
            return func(*args, **(kwargs or {}))

    names, x = [], torch.randn(2, 5, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    expected = attention(x, x, x, need_weights=False)[0]
    with Seen():
        y = attention(x, x, x, need_weights=False)[0]
    assert pytorch_inside.stock_attention in names
    assert torch.equal(y, expected)
