"""What a compiled step keeps for backward, counted on simulated tensors: by inductor's own choice, and by ours.

The forward is traced with its backward into one graph, as torch.compile does it, and PyTorch's partitioner is asked
what it would keep. No code is generated, so neither the GPU nor a compiler is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from invact import probing
from invact.compiling.compiler_inside import (
    aot_function,
    joint_graph_passes,
    min_cut_rematerialization_partition,
    select_decomp_table,
    virtualized,
)
from invact.compiling.inductor import mark_what_is_kept, reserves_off
from invact.errors.checks import Inputs
from invact.errors.own_errors import first_line, raised_by_invact, users_call
from invact.ledger.storages import storage_sizes
from invact.pytorch.compiler_flags import as_if_compiling
from invact.pytorch.containers import tree_leaves
from invact.pytorch.fake_tensors import FakeTensorMode
from invact.simulation.as_on_gpu import AsOnGpu
from invact.simulation.autocast import autocast_as_set
from invact.simulation.setting import Setting
from invact.simulation.simulated_model import simulated
from invact.simulation.simulated_tensors import fake_tensor_log_silent
from invact.simulation.time_limit import TimeLimit, TookTooLongError


@dataclass(frozen=True)
class CompiledBytes:
    """Bytes kept between forward and backward of a compiled step, without the model's weights and casts of them.

    Attributes:
        by_default: with `torch.compile(model)`.
        with_invact: with `torch.compile(model, backend="invact")`.
        notes: what the reader should know. Where a model could not be counted, both numbers are None, and a note says
            why.
    """

    by_default: int | None
    with_invact: int | None
    notes: list[str]


def compiled_bytes(model: nn.Module, inputs: Inputs, setting: Setting) -> CompiledBytes:
    """Counts a compiled training step of `model`, which is left as it was, as one graph.

    Args:
        model: in the mode in which it is trained; patched or not, on any device or on meta.
        inputs: a dict is passed as keyword arguments, a tuple as positional ones.
        setting: where and how it would be trained.

    Example:
        >>> block = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64))
        >>> counted = compiled_bytes(block, (torch.ones(8, 64),), Setting(torch.device("cpu")))
        >>> counted.by_default, counted.with_invact
        (18496, 10304)
    """
    try:
        with TimeLimit(probing.TIME_LIMIT):
            joint = _joint_graph(model, inputs, setting)
    except TookTooLongError:
        return _not_counted(f"tracing it takes longer than {probing.TIME_LIMIT:.0f} seconds")
    except Exception as error:
        if raised_by_invact(error):
            raise
        return _not_counted(f"its forward and backward can not be traced as one graph ({first_line(error)[:160]})")
    if joint is None:
        return CompiledBytes(0, 0, ["the compiled step keeps nothing: no output asks for a gradient."])
    ours = joint.copy()
    mark_what_is_kept(ours.module.graph)
    by_default = joint.kept_bytes()
    with reserves_off():
        with_invact = ours.kept_bytes()
    return CompiledBytes(
        by_default, with_invact, ["the compiled step was counted as one graph: graph breaks keep more."]
    )


def _not_counted(why: str) -> CompiledBytes:
    return CompiledBytes(None, None, [f"the compiled step could not be counted: {why}."])


@dataclass(frozen=True)
class _Joint:
    """Forward and backward of a step in one graph."""

    module: fx.GraphModule
    weights: set[str]  # names of the placeholders that are parameters or buffers
    options: dict[str, Any]  # of the partitioner

    def copy(self) -> _Joint:
        """One that the partitioner may change while this stays."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.module.graph, {}))
        for old, new in zip(self.module.graph.nodes, graph.nodes, strict=True):
            new.meta = dict(old.meta)
        return _Joint(fx.GraphModule(self.module, graph), self.weights, self.options)

    def kept_bytes(self) -> int:
        """Bytes of the storages that the partitioner hands from forward to backward."""
        forward, _ = min_cut_rematerialization_partition(self.module, (), compiler="inductor", **self.options)
        (output,) = forward.graph.find_nodes(op="output")
        kept = output.args[0][self.options["num_fwd_outputs"] :]
        sizes: dict[Any, int] = {}
        for node in kept:
            value = node.meta.get("val") if isinstance(node, fx.Node) else None
            if isinstance(value, Tensor) and not _comes_of(node, self.weights):
                sizes.update(storage_sizes(value))
        return sum(sizes.values())


def _comes_of(node: fx.Node, weights: set[str]) -> bool:
    """Whether a node is a weight, or computed from one weight alone, as autocast's casts of them are."""
    while node.op != "placeholder":
        if len(node.all_input_nodes) != 1:
            return False
        (node,) = node.all_input_nodes
    return node.name in weights


class _Traced(Exception):  # noqa: N818  nothing has gone wrong
    """Ends the tracing with what was to be traced."""

    def __init__(self, module: fx.GraphModule, options: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.options = module, options


def _joint_graph(model: nn.Module, inputs: Inputs, setting: Setting) -> _Joint | None:
    """The graph as inductor's own passes leave it for the partitioner; None if there is no backward."""

    def stop(module: fx.GraphModule, _: Sequence[Any], **options: Any) -> Any:
        raise _Traced(module, options)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with simulated(model, inputs, setting, mode) as (weights, simulated_inputs), fake_tensor_log_silent():
        forward = _forward(model, list(weights), isinstance(inputs, dict), setting)
        traced = aot_function(forward, _as_it_is, _as_it_is, partition_fn=stop, decompositions=select_decomp_table())
        try:
            with torch.enable_grad(), as_if_compiling():
                traced(list(weights.values()), simulated_inputs)
        except _Traced as found:
            with virtualized.set_fake_mode(mode):
                joint_graph_passes(found.module)
            primals = found.module.graph.find_nodes(op="placeholder")[: len(weights)]
            return _Joint(found.module, {node.name for node in primals}, found.options)
    return None


def _forward(model: nn.Module, names: list[str], by_keyword: bool, setting: Setting) -> Callable[..., list[Tensor]]:
    as_on_gpu = AsOnGpu(setting) if setting.device.type == "cuda" else nullcontext()

    def forward(weights: list[Tensor], inputs: Any) -> list[Tensor]:
        args, kwargs = ((), inputs) if by_keyword else (inputs, {})
        with as_on_gpu, autocast_as_set(setting):
            named = dict(zip(names, weights, strict=True))
            output = users_call(torch.func.functional_call, model, named, args, kwargs)
        return list(_tensors(output))

    return forward


def _tensors(output: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _as_it_is(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    return gm
