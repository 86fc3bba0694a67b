"""Compilers, tracers and wrappers of others on patched models, and what is left when a model is gone."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

import invact
from invact.swapping import class_over
from invact.swapping.patched import Patched


class Block(nn.Module):
    """An activation that is a module, one that is written out, and a parameter of its own."""

    def __init__(self, width=16):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, width) / 4)
        self.act, self.down, self.up = nn.SiLU(), nn.Linear(32, width), nn.Linear(width, 32)

    def forward(self, x):
        x = x + self.down(F.gelu(x @ self.weight.t()))
        return x + self.down(self.act(self.up(x)))


@pytest.fixture
def x():
    return torch.randn(8, 16)


@pytest.fixture
def pair(x):
    stock = Block()
    ours = copy.deepcopy(stock)
    assert len(invact.patch(ours, (x,)).inverted) == 2
    return stock, ours


@pytest.mark.parametrize("training", [True, False])
def test_traced_and_exported_models_hold_the_stock_graph_in_either_mode(pair, training, x, train_alike):
    stock, ours = (model.train(training) for model in pair)
    assert torch.fx.symbolic_trace(ours).code == torch.fx.symbolic_trace(stock).code
    train_alike(stock, torch.fx.symbolic_trace(ours))
    graphs = [[str(node.target) for node in torch.export.export(m, (x,)).graph.nodes] for m in (stock, ours)]
    assert graphs[0] == graphs[1]


def test_torchvisions_feature_extractor_takes_a_patched_model():
    from torchvision.models import mobilenet_v3_small
    from torchvision.models.feature_extraction import create_feature_extractor

    stock, images = mobilenet_v3_small(), torch.randn(2, 3, 64, 64)
    ours = copy.deepcopy(stock)
    assert invact.patch(ours, (images,)).inverted
    for training in (True, False):
        outputs = [create_feature_extractor(m.train(training), ["features.5"])(images) for m in (stock, ours)]
        torch.testing.assert_close(outputs[1]["features.5"], outputs[0]["features.5"])


def test_torch_jit_script_refuses_with_what_to_do_and_works_after_that():
    ours, x = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), torch.randn(8, 16)
    invact.patch(ours, (x,))
    with pytest.raises(NotImplementedError, match=r"Call invact.unpatch\(model\) first"):
        torch.jit.script(ours)
    invact.unpatch(ours)
    assert torch.equal(torch.jit.script(ours)(x), ours(x))


def test_equal_blocks_are_compiled_as_often_as_in_stock(x):
    def graphs(patched):
        torch._dynamo.reset()
        model = nn.Sequential(*(Block() for _ in range(6)))
        if patched:
            invact.patch(model, (x,))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for block in model:
            block.compile(backend="eager")
        model(x).sum().backward()
        counters = torch._dynamo.utils.counters
        return counters["stats"]["unique_graphs"], counters["frames"]["ok"], dict(counters["graph_break"])

    assert graphs(patched=True) == graphs(patched=False)


def test_what_was_compiled_before_goes_on_when_patched_and_unpatched(x, train_alike):
    torch._dynamo.reset()
    stock = Block()
    ours = copy.deepcopy(stock)
    compiled = torch.compile(ours, backend="aot_eager")
    train_alike(stock, compiled)
    invact.patch(ours, (x,))
    train_alike(stock, compiled)
    invact.unpatch(ours)
    train_alike(stock, compiled)


class Helped(nn.Module):
    slope = 0.2

    def helper(self, x):
        return F.leaky_relu(x, 0.2)

    def forward(self, x):
        return self.helper(x)


@pytest.mark.parametrize(
    "change", [lambda a: setattr(a, "helper", lambda x: 2 * x), lambda a: setattr(a, "alpha", 0.2)]
)
def test_what_changes_after_compiling_counts_as_in_stock(change, x, train_alike):
    torch._dynamo.reset()
    stock = nn.Sequential(nn.Linear(16, 32), Helped(), nn.Linear(32, 32), nn.ELU(0.7), nn.Linear(32, 16))
    ours = copy.deepcopy(stock)
    assert len(invact.patch(ours, (x,)).inverted) == 2
    compiled = torch.compile(ours, backend="aot_eager")
    train_alike(stock, compiled)
    for model in (stock, ours):
        change(model[1])
        change(model[3])
    train_alike(stock, compiled)


def test_models_stacked_for_vmap_give_the_gradients_of_stock(x):
    stock = [Block() for _ in range(3)]
    ours = copy.deepcopy(stock)
    for model in ours:
        invact.patch(model, (x,))
    results = []
    for models in (stock, ours):
        base = copy.deepcopy(models[0]).to("meta")
        loss = lambda p, b, x, base=base: functional_call(base, (p, b), (x,)).pow(2).mean()  # noqa: E731
        results.append(vmap(grad(loss), (0, 0, None))(*stack_module_state(models), x))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-4, atol=1e-6)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("removed_first", [True, False])
def test_a_parametrization_put_on_a_rewritten_module_stays_and_goes(pair, removed_first, train_alike):
    from torch.nn.utils import parametrize

    stock, ours = pair
    for model in pair:
        parametrize.register_parametrization(model, "weight", Doubled())
    train_alike(stock, ours)
    if not removed_first:
        invact.unpatch(ours)
        train_alike(stock, ours)
    for model in pair:
        parametrize.remove_parametrizations(model, "weight")
    train_alike(stock, ours)
    invact.unpatch(ours)
    assert type(ours) is Block
    train_alike(stock, ours)


@pytest.mark.parametrize("when", ["before", "after"])
def test_pruning_comes_and_goes(when, x, train_alike):
    from torch.nn.utils import prune

    stock = Block()
    ours = copy.deepcopy(stock)
    steps = [lambda model: prune.l1_unstructured(model, "weight", 0.3), lambda model: invact.patch(model, (x,))]
    for step in steps if when == "before" else steps[::-1]:
        step(ours)
    steps[0](stock)
    train_alike(stock, ours)
    for model in (stock, ours):
        prune.remove(model, "weight")
    train_alike(stock, ours)
    invact.unpatch(ours)
    train_alike(stock, ours)


def test_replicas_averages_and_dtypes_of_a_patched_model_are_patched(pair, x):
    from torch.optim.swa_utils import AveragedModel

    stock, ours = pair
    replica = ours._replicate_for_data_parallel()
    assert type(replica) is type(ours)
    average = AveragedModel(ours)
    average.update_parameters(ours)
    assert isinstance(average.module.act, Patched)
    torch.testing.assert_close(average(x), stock(x))
    names = []
    ours.apply(lambda module: names.append(type(module).__name__))
    assert names == ["SiLU", "Linear", "Linear", "Block"]
    torch.testing.assert_close(ours.bfloat16()(x.bfloat16()), stock.bfloat16()(x.bfloat16()), rtol=2e-2, atol=2e-2)
    ours.to("meta").to_empty(device="cpu")
    assert isinstance(ours.act, Patched)


def test_classes_made_in_functions_go_with_their_models(x):
    def gone():
        class Act(nn.Module):
            def forward(self, x):
                return F.gelu(x)

        class Local(Block):
            def __init__(self):
                super().__init__()
                self.act = Act()

            def forward(self, x):
                return super().forward(x) + self.down(F.gelu(self.up(x)))

        model = Local()
        assert len(invact.patch(model, (x,)).inverted) == 2
        model(x).sum().backward()
        return [weakref.ref(each) for each in (Act, Local, model, type(model), type(model.act))]

    gc.collect()
    before = len(class_over._CLASSES)
    left = [reference for _ in range(3) for reference in gone()]
    gc.collect()
    gc.collect()  # the classes of ours first, and then what they are of
    assert [reference() for reference in left] == [None] * len(left)
    assert len(class_over._CLASSES) == before


@pytest.mark.parametrize("hook", [None, lambda m, a, y: None, lambda m, a, y: (y.mul_(2), None)[1]])
@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(inplace=True)], ids=repr)
def test_the_input_goes_with_the_graph_without_the_garbage_collector(act, hook, x):
    model = nn.Sequential(nn.Linear(16, 32), copy.deepcopy(act), nn.Linear(32, 16))
    invact.patch(model, (x,))
    inputs = []
    model[1].register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    if hook:
        model[1].register_forward_hook(hook)
    gc.collect()
    gc.disable()
    try:
        model(x).sum().backward()
        dropped = model(x).sum()
        del dropped
        assert [reference() is None for reference in inputs] == [True, True]
    finally:
        gc.enable()


def test_compiled_an_output_changed_in_place_later_gives_stocks_gradients():
    """Functionalised, an operation in place would reach what was kept: no version tells of it there."""
    torch._dynamo.reset()
    stock = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    patched, x = copy.deepcopy(stock), torch.randn(4, 16)
    invact.patch(patched, (x,))
    for model in (stock, patched):
        model[1].register_forward_hook(lambda module, args, out: (out.mul_(2), None)[1])
    model(x)
    stock(x).square().mean().backward()
    torch.compile(patched, backend="aot_eager")(x).square().mean().backward()
    for ours, theirs in zip(patched.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
