"""What is leaned on inside PyTorch's compiler: each private name, what for, and what breaks without.

Apart from `invact.pytorch` because inductor takes seconds to import: only who compiles comes here.
"""

from __future__ import annotations

from invact.pytorch.version_check import names_missing

try:
    # How torch.compile reads `mode` and `options` for inductor: with another backend it leaves both to that.
    from torch import _TorchCompileInductorWrapper as Inductor

    # The settings of the partitioner, which decides what a compiled forward keeps, and of inductor, to join a pass of
    # the user's with ours: without them the backend is the default one.
    from torch._functorch import config as partitioner_settings

    # Traces forward and backward into one graph, and parts it: nothing could be counted.
    from torch._functorch.aot_autograd import aot_function

    # The operations that PyTorch itself computes again: what is to be kept could not be told.
    from torch._functorch.partitioners import get_default_op_list, min_cut_rematerialization_partition
    from torch._inductor import config as inductor_settings

    # What inductor calls on a graph of forward and backward, and names in its cache: without it nothing can be marked,
    # or a graph that was compiled by another version of invact would be taken for one of this.
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    # What inductor does to a graph before it is parted, and the operations it wants there: the count would be another.
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    # Where those passes look for the simulated tensors that a graph is made of: a model with dropout would fail.
    from torch._inductor.virtualized import V as virtualized  # noqa: N811  a namespace
except ImportError as _error:
    raise names_missing(_error) from _error

__all__ = [
    "CustomGraphPass",
    "Inductor",
    "aot_function",
    "get_default_op_list",
    "get_hash_for_files",
    "inductor_settings",
    "joint_graph_passes",
    "min_cut_rematerialization_partition",
    "partitioner_settings",
    "select_decomp_table",
    "virtualized",
]
