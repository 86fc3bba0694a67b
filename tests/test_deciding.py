"""Decisions are made from records of a pass alone: no model is needed to see why."""

from dataclasses import replace

import torch

from invact.kernels import CURVES
from invact.ledger.entries import Entry
from invact.planning.deciding import Pass, decide_sites
from invact.planning.keepers import Keepers
from invact.planning.options import Options
from invact.probing.records import Call
from invact.recognition.dependencies_of_modules import dependencies_of_module
from invact.recognition.found_site import Found
from invact.report import reasons

ELEMENTS = 64
X, Y, Z = 1, 2, 3  # storages: of the input, of the output, of another tensor
CALL = Call(
    path="act",
    simple=True,
    needs_grad=True,
    y_key=Y,
    y_nbytes=4 * ELEMENTS,
    y_cast=False,
    dtype=torch.float32,
    bit_nbytes=ELEMENTS // 8,
    changed_later=False,
    input_changed_later=False,
    input_contiguous=True,
    in_place=False,
    hooked=False,
    elsewhere=False,
)
CLASSES = {"act": "GELU", "act2": "GELU", "down": "Linear", "other": "LayerNorm"}


def site(path="act", **arguments):
    return Found(path, CURVES["gelu"], "GELU", None, path, dependencies_of_module(torch.nn.GELU()), **arguments)


def kept(*pairs):
    return [Entry(key, 4 * ELEMENTS, path, cast_of=None) for key, path in pairs]


def decision(stock, derived=None, call=CALL, found=None, **options):
    """Of one site, where these storages are kept by these modules; with all derived the same ones if not told."""
    seen = Pass({"act": [call]}, CLASSES, Keepers(kept(*stock)), Keepers(kept(*(derived or stock))))
    (made,) = decide_sites([found or site()], seen, Options(**options))
    return made


def test_a_site_is_inverted_where_another_keeps_its_output():
    made = decision([(X, "act"), (Y, "down")])
    assert (made.action, made.reason) == ("invert", reasons.others_keep_its_output({"Linear"}))
    assert made.bytes_saved == 4 * ELEMENTS - ELEMENTS // 8


def test_a_site_is_kept_where_one_tensor_would_take_the_place_of_another():
    made = decision([(X, "act")])
    assert (made.action, made.reason) == ("keep", reasons.NOBODY_ELSE)


def test_a_site_is_kept_where_another_keeps_its_input():
    made = decision([(X, "act"), (X, "other"), (Y, "down")])
    assert (made.action, made.reason) == ("keep", reasons.others_keep_its_input({"LayerNorm"}))


def test_a_site_of_several_tensors_is_inverted_though_nobody_keeps_its_output():
    made = decision([(X, "act"), (Z, "act")])
    assert (made.action, made.reason) == ("invert", reasons.SEVERAL_TENSORS)


def test_a_site_whose_input_is_not_kept_once_all_is_derived_is_not_inverted():
    made = decision([(X, "act"), (Y, "down")], derived=[(Z, "other")])
    assert (made.action, made.reason) == ("keep", reasons.INPUT_NOT_KEPT_EITHER)


def test_a_few_bits_are_kept_where_nothing_exact_pays_and_it_is_asked_for():
    made = decision([(X, "act")], few_bits=2)
    assert (made.action, made.bits) == ("approximate", 2)
    assert made.bytes_saved == 4 * ELEMENTS - 2 * ELEMENTS // 8
    assert decision([(X, "act"), (Y, "down")], few_bits=2).action == "invert"


def test_what_stands_against_inverting_is_told_before_what_it_would_save():
    stock = [(X, "act"), (Y, "down")]
    obstacles = {
        reasons.EXACT: decision(stock, exact=True),
        reasons.LEFT_OUT: decision(stock, exclude="a*"),
        reasons.KEEPS_ONLY_OUTPUTS: decision([(Y, "act"), (Y, "down")]),
        reasons.CHANGES_UNSEEN: decision(stock, found=replace(site(), dependencies=None)),
        reasons.REPLACED: decision(stock, found=site(replaced=True)),
        reasons.NOT_ONE_TENSOR: decision(stock, call=replace(CALL, simple=False)),
        reasons.NO_GRADIENT: decision(stock, call=replace(CALL, needs_grad=False)),
        reasons.HOOKED: decision(stock, call=replace(CALL, hooked=True)),
        reasons.CHANGED_LATER: decision(stock, call=replace(CALL, changed_later=True)),
        reasons.ELSEWHERE: decision(stock, call=replace(CALL, elsewhere=True)),
    }
    for reason, made in obstacles.items():
        assert (made.action, made.reason, made.bytes_saved) == ("keep", reason, 0)


def test_one_decision_tells_on_the_next():
    """The second of two activations in a row keeps the first one's output, until it is inverted itself."""
    second = replace(CALL, path="act2", y_key=Z)
    stock = Keepers(kept((X, "act"), (Y, "act2"), (Z, "down")))
    seen = Pass({"act": [CALL], "act2": [second]}, CLASSES, stock, Keepers(kept((X, "act"), (Y, "act2"), (Z, "down"))))
    first, then = decide_sites([site(), site("act2")], seen, Options())
    assert (first.action, first.reason) == ("invert", reasons.others_keep_its_output({"GELU"}))
    assert (then.action, then.reason) == ("keep", reasons.others_keep_its_input({"GELU"}))
