"""Activations written out in a method are found, inverted where it pays, and put back without a trace."""

import copy
import functools
import gc
import importlib.util
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invact
from invact.planning import walking
from invact.recognition import expressions
from invact.recognition.curves import recognise
from invact.recognition.expressions import written_in


def author_swish(x):
    return x * torch.sigmoid(x)


class Block(nn.Module):
    beta = 1.0

    def __init__(self, width=16):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 64), nn.Linear(64, width), nn.LayerNorm(width)
        self.function = F.gelu
        self.slope = 1.702


class CallsFunctional(Block):
    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class CallsByLongName(Block):
    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.up(x)))


class CallsWithOptions(Block):
    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class BuiltOfSigmoid(Block):
    def forward(self, x):
        x = self.up(x)
        x = x * torch.sigmoid(x)
        return self.down(x)


class BuiltOfAttributes(Block):
    def forward(self, x):
        x = self.up(x)
        return self.down(x * (self.slope * x).sigmoid())


class CallsAttribute(Block):
    def forward(self, x):
        return self.down(self.function(self.up(x)))


class CallsPartial(Block):
    def __init__(self):
        super().__init__()
        self.function = functools.partial(F.gelu, approximate="tanh")

    def forward(self, x):
        return self.down(self.function(self.up(x)))


class CallsAuthorsFunction(Block):
    def forward(self, x):
        return self.down(author_swish(self.up(x)))


class CallsInAnotherMethod(Block):
    def forward(self, x):
        return self.norm(self._feed(x))

    def _feed(self, x):
        return self.down(F.silu(self.up(x)))


class Decorated(Block):
    def twice(function):  # noqa: N805
        @functools.wraps(function)
        def wrapper(self, x):
            return function(self, function(self, x))

        return wrapper

    twice = staticmethod(twice)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class WithSuper(CallsInAnotherMethod):
    def forward(self, x):
        return super().forward(x) + self.down(F.gelu(self.up(x)))


FOUND = {
    CallsFunctional: ["forward:gelu"],
    CallsByLongName: ["forward:silu"],
    CallsWithOptions: ["forward:gelu_tanh"],
    BuiltOfSigmoid: ["forward:silu"],
    BuiltOfAttributes: ["forward:quick_gelu"],
    CallsAttribute: ["forward:gelu"],
    CallsPartial: ["forward:gelu_tanh"],
    CallsAuthorsFunction: ["forward:silu"],
    CallsInAnotherMethod: ["_feed:silu"],
    Decorated: ["forward:gelu"],
    WithSuper: ["forward:gelu", "_feed:silu"],
}


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
def test_expressions_are_found_inverted_and_put_back(kind, count_kept, run_backward):
    model, x = kind(), torch.randn(4, 16)
    kept, (output, gradient) = count_kept(model, (x,)), run_backward(model, (x,))
    attributes = dict(model.__dict__)

    report = invact.patch(model, (x,))
    assert sorted(site.path for site in report.inverted) == sorted(FOUND[kind])
    assert report.bytes_before == kept
    assert report.bytes_after == count_kept(model, (x,)) < kept
    after = run_backward(model, (x,))
    torch.testing.assert_close(after[0], output, rtol=1e-5, atol=1e-5)
    assert (after[1] - gradient).norm() < 1e-4 * gradient.norm()

    assert model.__dict__ == attributes
    with torch.no_grad():
        assert torch.equal(model(x).flatten(), output)
    assert invact.unpatch(model) == len(FOUND[kind])
    assert type(model) is kind
    assert model.__dict__ == attributes
    assert torch.equal(run_backward(model, (x,))[1], gradient)


@pytest.fixture
def block_that_computes(tmp_path):
    """Makes a block with the source of one expression of x between its layers."""

    def make(expression):
        path = tmp_path / "block.py"
        path.write_text(
            "import math\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n"
            "class Block(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)\n\n"
            "    def forward(self, x):\n"
            "        x = self.up(x)\n"
            f"        return self.down({expression})\n"
        )
        spec = importlib.util.spec_from_file_location("block", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.Block()

    return make


@pytest.mark.parametrize(
    ("expression", "curve"),
    [
        ("F.elu(x, 0.7)", "elu(alpha=0.7)"),
        ("F.leaky_relu(x, 0.2)", "leaky_relu(negative_slope=0.2)"),
        ("torch.where(x > 0, x, 0.1 * x)", "leaky_relu(negative_slope=0.1)"),
        ("torch.maximum(x, 0.3 * x)", "leaky_relu(negative_slope=0.3)"),
        ("F.softplus(x, beta=2)", "softplus(beta=2, threshold=20)"),
        ("x / (1 + torch.abs(x))", "softsign"),
        ("F.logsigmoid(x)", "log_sigmoid"),
        ("-F.softplus(-x)", "log_sigmoid"),
        ("torch.clamp(x, 0, 6)", "relu6"),
        ("x.clip(0, 6)", "relu6"),
        ("x.clamp_(0, 6)", "relu6"),
        ("x.clamp_min(0)", "relu"),
        ("F.hardtanh_(x)", "hardtanh"),
        ("x.clamp_min(-2).clamp_max(0.5)", "hardtanh(min_val=-2, max_val=0.5)"),
        ("F.relu(x) ** 2", "squared_relu"),
        ("x.clamp(min=0).square()", "squared_relu"),
        ("0.5 * x * torch.erfc(-x * math.sqrt(0.5))", "gelu"),
        ("0.5 * x * (1 + torch.special.erf(x / math.sqrt(2)))", "gelu"),
        ("torch.multiply(x, torch.special.expit(x))", "silu"),
        ("torch.divide(x, 1 + torch.exp(-x))", "silu"),
    ],
)
def test_an_activation_is_found_in_whatever_operations_it_is_written(
    expression, curve, block_that_computes, count_kept, run_backward
):
    model, x = block_that_computes(expression), torch.randn(4, 16)
    _, expected = run_backward(model, (x,))
    report = invact.patch(model, (x,))
    assert [(site.activation, site.action) for site in report.sites] == [(curve, "invert")]
    assert count_kept(model, (x,)) == report.bytes_after
    torch.testing.assert_close(run_backward(model, (x,))[1], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["elu", "celu", "selu", "leaky_relu"])
def test_what_stock_computes_in_place_from_its_output_stays(name, block_that_computes):
    (site,) = invact.plan(block_that_computes(f"F.{name}_(x)"), (torch.randn(4, 16),)).sites
    assert (site.action, site.reason) == ("keep", "stock PyTorch already keeps only its output")


def test_several_in_one_method_are_told_apart_and_chosen_by_path():
    class Several(Block):
        def forward(self, x):
            x = self.down(F.gelu(self.up(x)))
            x = self.down(F.gelu(self.up(x)).relu())
            return self.down(F.gelu(self.up(F.silu(x))))

    report = invact.plan(nn.Sequential(Several()), (torch.randn(4, 16),))
    assert [(site.path, site.module_class) for site in report.sites] == [
        ("0.forward:gelu", "F.gelu(…)"),
        ("0.forward:relu", "….relu()"),
        ("0.forward:gelu.2", "F.gelu(…)"),
        ("0.forward:gelu.3", "F.gelu(…)"),
        ("0.forward:silu", "F.silu(x)"),
    ]
    chosen = invact.plan(nn.Sequential(Several()), (torch.randn(4, 16),), include="*:gelu.3")
    assert [site.path for site in chosen.inverted] == ["0.forward:gelu.3"]


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


class CallsWhatIsOfAnother(Block):
    def forward(self, x):
        x = copy.copy(self.up(x))  # no part of any activation, whatever it does
        return self.down(x * torch.sigmoid(x))


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


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("F.gelu(self.up(x)) + F.softmax(x.sum(), 0)", ["gelu"]),
        ("F.dropout(x, 0.1, self.training)", []),
        ("self.up(x) * torch.sigmoid(self.up(x))", ["sigmoid"]),
        ("x.exp()", []),
        ("x * torch.sigmoid(x.detach())", ["sigmoid"]),
        ("torch.max(x, 1)[0] + x", []),
        ("torch.where(x > 0, x, x - 1)", []),
        ("F.prelu(x, self.up.bias[:1])", []),
        ("F.rrelu(x, 0.1, 0.3)", []),
    ],
)
def test_what_is_no_activation_of_one_value_is_not_taken_for_one(expression, found, block_that_computes):
    assert [str(written.curve) for written in written_in(block_that_computes(expression))] == found


def test_other_instances_of_the_class_and_other_threads_are_not_touched():
    patched, other = CallsFunctional(), CallsFunctional()
    invact.patch(patched, (torch.randn(4, 16),))
    assert type(other) is CallsFunctional
    assert type(patched) is not CallsFunctional
    assert isinstance(patched, CallsFunctional)


def test_a_deepcopy_trains_by_itself_and_a_pickle_comes_back_stock(run_backward):
    model, x = CallsFunctional(), torch.randn(4, 16)
    expected = run_backward(model, (x,))[1]
    invact.patch(model, (x,))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.up.weight.zero_()
    assert (run_backward(twin, (x,))[1] - expected).norm() < 1e-5 * expected.norm()
    assert invact.unpatch(twin) == 1
    assert torch.equal(run_backward(twin, (x,))[1], expected)
    assert torch.equal(run_backward(pickle.loads(pickle.dumps(twin)), (x,))[1], expected)


def thrice(function):
    @functools.wraps(function)
    def wrapper(self, x):
        return 3 * function(self, x)

    return wrapper


class Wrapped(Block):
    @thrice
    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class WrappedLater(Block):
    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("wrapped", ["in the source", "later", "on the module", "by another name"])
def test_an_expression_behind_a_wrapper_is_left_alone(wrapped, monkeypatch, run_backward):
    model, x = Wrapped() if wrapped == "in the source" else WrappedLater(), torch.randn(4, 16)
    original = WrappedLater.forward
    if wrapped == "later":
        monkeypatch.setattr(WrappedLater, "forward", functools.wraps(original)(lambda self, x: 3 * original(self, x)))
    elif wrapped == "on the module":
        model.forward = functools.partial(original, model)
    elif wrapped == "by another name":
        monkeypatch.setattr(WrappedLater, "forward", lambda self, x: 3 * original(self, x))
    expected = run_backward(model, (x,))[1]
    assert invact.patch(model, (x,)).sites == []
    assert torch.equal(run_backward(model, (x,))[1], expected)


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


def test_pytorchs_own_transformer_layer_calls_its_activation_as_an_attribute(run_backward):
    model = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, activation="gelu", batch_first=True)
    x = torch.randn(2, 5, 16)
    expected = run_backward(model, (x,))[1]
    report = invact.patch(model, (x,))
    assert [site.path for site in report.inverted] == ["_ff_block:gelu"]
    assert (run_backward(model, (x,))[1] - expected).norm() < 1e-4 * expected.norm()


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
