"""Any graph of objects that a forward changes is put back, as hypothesis draws them."""

import collections
import functools
import gc
import types

import numpy
import torch
from described import described
from hypothesis import given, settings
from hypothesis import strategies as st
from objects_of_users import Frozen, Settings, Slotted, model_with
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_outputs import BaseModelOutput

from invact.snapshot.snapshot import as_it_was

LEAVES = st.sampled_from([None, 1, 2.5, "text", b"bytes", True])
GRAPHS = st.recursive(
    st.one_of(LEAVES, st.builds(lambda: torch.zeros(2)), st.builds(lambda: numpy.zeros(2)), st.builds(Slotted)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(Frozen),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(collections.OrderedDict),
        st.lists(inner, max_size=3).map(collections.deque),
        st.builds(lambda v: types.SimpleNamespace(value=v), inner),
        st.builds(lambda v: Settings(1.0, v), inner),
        st.builds(lambda v: lambda x=v: v, inner),
        st.builds(lambda v: functools.partial(print, v, key=v), inner),
        st.builds(lambda v: BaseModelOutput(last_hidden_state=v), inner.filter(lambda v: v is not None)),
    ),
    max_leaves=8,
)


def scramble(value, draw, seen):
    """Changes what can be changed in a graph of objects, here and there, as a careless forward might."""
    if id(value) in seen:
        return
    seen[id(value)] = value
    inside = gc.get_referents(value) if not isinstance(value, (type, types.ModuleType, str)) else []
    if isinstance(value, types.FunctionType):
        inside = [cell.cell_contents for cell in value.__closure__ or ()]
        if draw(st.booleans()):
            value.__defaults__ = (5,)
    for each in list(inside):
        if not isinstance(each, (type, types.ModuleType)):
            scramble(each, draw, seen)
    if not draw(st.booleans()):
        return
    if isinstance(value, collections.OrderedDict):
        collections.OrderedDict.__setitem__(value, draw(st.sampled_from("abz")), 7)
        collections.OrderedDict.move_to_end(value, next(iter(collections.OrderedDict.keys(value))))
    elif isinstance(value, dict):
        dict.pop(value, draw(st.sampled_from("abc")), None)
        dict.__setitem__(value, draw(st.sampled_from("abz")), 7)
    elif isinstance(value, list):
        value.insert(0, 7)
    elif isinstance(value, collections.deque):
        value.rotate(1)
        value.append(7)
    elif isinstance(value, numpy.ndarray):
        value += 1
    elif isinstance(value, torch.Tensor):
        value.mark = 7
        value.requires_grad_()
        value.add_(1)
    elif isinstance(value, (Slotted, types.SimpleNamespace)):
        value.value = 7


@settings(max_examples=80, deadline=None)
@given(graphs=st.lists(GRAPHS, min_size=1, max_size=4), data=st.data())
def test_any_graph_of_objects_that_a_forward_changes_is_put_back(graphs, data):
    model = model_with(**{f"held_{number}": graph for number, graph in enumerate(graphs)})
    before = described(model)
    with as_it_was(model), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        seen = {}
        for number in range(len(graphs)):
            scramble(getattr(model, f"held_{number}"), data.draw, seen)
        model.more = 1
    assert described(model) == before
