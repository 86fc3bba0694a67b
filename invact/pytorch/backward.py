"""The backward pass that is running, and the graph's nodes."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from invact.pytorch.version_check import found

# The number of the backward pass that is running, or -1, and what is to be done at its end: a tensor that several want
# would be made for each of them, or held until the graph goes.
current_backward: Callable[[], int] = found(torch._C, "_current_graph_task_id")

# The node of the graph that is running: what backward allocates could not be put down to a module.
current_node: Callable[[], Any] = found(torch._C, "_current_autograd_node")

# Whether that pass leaves the graph for another one: what is asked for the last time could not go before its node does.
keeps_graph: Callable[[], bool] = found(torch._C._autograd, "_get_current_graph_task_keep_graph")

# The function that starts a backward pass: whoever else asks for a kept tensor is code written in Python.
engine_call: types.FunctionType = found(torch.autograd.graph, "_engine_run_backward")
_engine: Any = found(torch.autograd.Variable, "_execution_engine")
when_backward_ends: Callable[[Callable[[], None]], None] = found(_engine, "queue_callback")


def node_name(node: Any) -> str:
    """Of a node of the graph, asked of its class: a Function in Python may have set a name of its own on its `ctx`."""
    name: str = type(node).name(node)
    return name
