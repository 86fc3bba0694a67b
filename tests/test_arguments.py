"""What the public functions are given: wrong kinds are told what to pass instead."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import invact
from invact.errors.checks import check_autocast, check_exact, check_inputs, check_model, check_patterns

X = torch.ones(2, 4)


class Mapped(dict):
    pass


@pytest.mark.parametrize(
    ("inputs", "advice"),
    [
        ("hello", r"is of type str.*Pass a tuple"),
        (5, r"is of type int.*Pass a tuple"),
        (X, r"is of type Tensor.*`\(x,\)`"),
        ([X, X], r"is of type list.*`tuple\(inputs\)`"),
        (("hello",), r"holds no tensor.*torch\.randn"),
        ((["hello", "world"], 3), r"holds no tensor"),
        ((np.ones(3),), r"holds no tensor"),
        ({"input_ids": [1, 2]}, r"holds no tensor.*input_ids="),
        ({0: X}, r"with the key 0.*names of the forward's arguments"),
        (("long " * 1000,), r"\.\.\., which"),
    ],
)
def test_inputs_of_a_wrong_kind_are_told_what_to_pass(inputs, advice):
    with pytest.raises(TypeError, match=advice) as raised:
        check_inputs(inputs)
    assert len(str(raised.value)) < 400


def test_a_mapping_that_is_no_dict_is_told_how_to_become_one():
    from collections import UserDict

    with pytest.raises(TypeError, match=r"`dict\(inputs\)`"):
        check_inputs(UserDict(input_ids=X))


class Graph:
    """A batch as PyTorch Geometric has it: an object with tensors."""

    x = X


@pytest.mark.parametrize("inputs", [(X,), {"x": X}, ("hello", X), ([X], 3), (Graph(),), (), {}, Mapped(x=X)])
def test_what_a_model_can_be_called_with_is_accepted(inputs):
    check_inputs(inputs)


@pytest.mark.parametrize("autocast", ["bf16", True, False, torch.float32, 16])
def test_autocast_is_a_dtype(autocast):
    with pytest.raises(TypeError, match=r"Pass torch\.bfloat16, torch\.float16 or None"):
        check_autocast(autocast)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_dtype_of_autocast_is_accepted(autocast):
    check_autocast(autocast)


@pytest.mark.parametrize("exact", [4, 1, 0, None, "yes", torch.tensor(True)])
def test_exact_is_a_switch(exact):
    with pytest.raises(TypeError, match=r"exact is .*Pass True or False"):
        check_exact(exact)
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    for function in (invact.plan, invact.patch):
        with pytest.raises(TypeError, match=r"exact is .*Pass True or False"):
            function(model, (X,), exact=exact)
    with pytest.raises(TypeError, match=r"exact is .*Pass True or False"), invact.patched(model, (X,), exact=exact):
        pass


def test_a_class_is_told_to_be_called():
    with pytest.raises(TypeError, match=r"class GELU itself.*`GELU\(\.\.\.\)`"):
        check_model(nn.GELU)
    with pytest.raises(TypeError, match=r"class GELU itself"):
        invact.plan(nn.GELU, (X,))


@pytest.mark.parametrize("patterns", [5, [3], ["*.act", 3], b"*.act", {"*.act": True}, True, X, iter(["*.act"])])
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_patterns_of_a_wrong_kind_are_told_what_to_pass(option, patterns):
    with pytest.raises(TypeError, match=rf"{option} is .*Pass a string, such as {option}='\*\.mlp\.act', or a list"):
        check_patterns(**{"include": None, "exclude": None, option: patterns})


@pytest.mark.parametrize("patterns", [None, "*.act", "", [], ["*.act"], ("a", "b"), {"a"}])
def test_patterns_are_a_string_or_several(patterns):
    check_patterns(patterns, patterns)
