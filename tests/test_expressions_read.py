"""What is read of a method is read once for all that are alike, anew where a name stands for something else."""

import gc
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from written_blocks import (
    Block,
    BuiltOfAttributes,
    CallsAttribute,
    CallsWhatIsOfAnother,
)

import invact
from invact.planning import walking
from invact.recognition import expressions
from invact.recognition.curves import recognise
from invact.recognition.expressions import written_in

SLOPE = 1.0


def authors_own(x):
    return x * torch.sigmoid(SLOPE * x)


class CallsWithGlobals(Block):
    def forward(self, x):
        x = self.up(x)
        return self.down(x * torch.sigmoid(SLOPE * x))


class CallsAuthorsOwnWithGlobals(Block):
    def forward(self, x):
        return self.down(authors_own(self.up(x)))


def test_what_an_expression_computes_is_found_anew_where_a_name_in_it_stands_for_something_else(monkeypatch):
    slow, fast, other = BuiltOfAttributes(), BuiltOfAttributes(), BuiltOfAttributes()
    fast.slope, other.slope = 1, 2.5
    assert [[w.curve.name for w in written_in(module)] for module in (slow, fast, other, slow)] == [
        ["quick_gelu"], ["silu"], ["sigmoid"], ["quick_gelu"]
    ]  # fmt: skip
    module = CallsAttribute()
    assert written_in(module)[0].curve.name == "gelu"
    module.function = F.silu
    assert written_in(module)[0].curve.name == "silu"
    for kind in (CallsWithGlobals, CallsAuthorsOwnWithGlobals):
        monkeypatch.setitem(globals(), "SLOPE", 1.0)
        assert written_in(kind())[0].curve.name == "silu"
        monkeypatch.setitem(globals(), "SLOPE", 1.702)
        assert written_in(kind())[0].curve.name == "quick_gelu"


def test_a_method_that_calls_functions_of_others_is_read_once_for_all_modules(monkeypatch):
    read = []
    places = expressions._places
    monkeypatch.setattr(expressions, "_places", lambda method: read.append(method.module) or places(method))
    found = [written_in(CallsWhatIsOfAnother()) for _ in range(3)]
    assert [[written.curve.name for written in each] for each in found] == [["silu"]] * 3
    assert len(read) == 1


def test_leaves_of_pytorchs_own_are_tried_once_for_all_that_are_alike(monkeypatch):
    tried = []
    monkeypatch.setattr(walking, "recognise", lambda module: tried.append(module) or recognise(module))
    model = nn.Sequential(nn.Dropout(0.1), nn.ELU(), nn.Dropout(0.1), nn.ELU(0.5), nn.ELU())
    assert [str(site.curve) for site in walking.walk(model)] == ["elu", "elu(alpha=0.5)", "elu"]
    assert sum(isinstance(module, nn.Dropout) for module in tried) == 1
    assert sum(isinstance(module, nn.ELU) for module in tried) == 2


def test_a_leaf_with_a_forward_of_its_own_is_not_taken_for_its_like():
    model = nn.Sequential(nn.SiLU(), nn.SiLU())
    model[1].forward = lambda x: F.gelu(x)
    assert [site.curve.name for site in walking.walk(model)] == ["silu", "gelu"]


def test_what_was_found_holds_no_model():
    def found_and_dropped():
        model = CallsAttribute()
        model.function = lambda x: F.gelu(x) if model.training else x
        model.cache = torch.zeros(3)
        written_in(model)
        return weakref.ref(model)

    gone = found_and_dropped()
    gc.collect()
    assert gone() is None


def test_what_a_method_reads_is_read_when_it_runs(run_backward):
    scale, slope = 1.0, 0.2

    class Reads(Block):
        def forward(self, x, offset=0.5):
            return self.down(F.leaky_relu(self.up(x), slope)) * scale + offset

    stock, patched, x = Reads(), Reads(), torch.randn(4, 16)
    patched.load_state_dict(stock.state_dict())
    assert len(invact.patch(patched, (x,)).inverted) == 1
    for change in ("nothing", "scale", "slope", "default", "method"):
        scale = 2.0 if change == "scale" else scale
        slope = 0.01 if change == "slope" else slope
        if change == "default":
            Reads.forward.__defaults__ = (0.7,)
        if change == "method":
            Reads.forward = lambda self, x: self.down(self.up(x))
        for a, b in zip(run_backward(stock, (x,)), run_backward(patched, (x,)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_source_that_is_not_what_runs_is_left_alone(block_that_computes, tmp_path, run_backward):
    model, x = block_that_computes("F.gelu(x)"), torch.randn(4, 16)
    path = tmp_path / "block.py"
    path.write_text(path.read_text().replace("F.gelu(x)", "F.gelu(x) * 3"))
    expected = run_backward(model, (x,))[1]
    assert invact.patch(model, (x,)).sites == []
    assert torch.equal(run_backward(model, (x,))[1], expected)


def test_what_is_read_once_keeps_no_model_alive():
    class Gelu(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(torch.nn.functional.gelu(self.a(x)))

    model = Gelu()
    assert len(invact.patch(model, (torch.randn(2, 4),)).inverted) == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
