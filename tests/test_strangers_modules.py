"""What strangers do with the modules of a model before, while and after they are patched: they train as stock does."""

import copy
import functools

import pytest
import torch
from small_blocks import Written, around, pair
from torch import nn
from torch.func import functional_call, grad, vmap

import invact
from invact.swapping.patched import Patched


@pytest.fixture
def x():
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


# --- hooks --------------------------------------------------------------------------------------------


def changes_in_place(module, args, output):
    output.mul_(2)


def changes_a_part(module, args, output):
    output[:, :4].zero_()


def changes_without_gradient(module, args, output):
    with torch.no_grad():
        output.mul_(2)


def changes_and_exchanges(module, args, output):
    output.add_(1)
    return output.relu()


def listens_to_the_gradient(module, args, output):
    output.register_hook(lambda gradient: 2 * gradient)


HOOKS = {
    "returns nothing": lambda act: act.register_forward_hook(lambda module, args, output: None),
    "exchanges": lambda act: act.register_forward_hook(lambda module, args, output: 2 * output),
    "changes in place": lambda act: act.register_forward_hook(changes_in_place),
    "changes in place, always called": lambda act: act.register_forward_hook(changes_in_place, always_call=True),
    "changes a part": lambda act: act.register_forward_hook(changes_a_part),
    "changes without gradient": lambda act: act.register_forward_hook(changes_without_gradient),
    "changes and exchanges": lambda act: act.register_forward_hook(changes_and_exchanges),
    "with keywords": lambda act: act.register_forward_hook(lambda m, a, k, output: 3 * output, with_kwargs=True),
    "gradient": lambda act: act.register_forward_hook(listens_to_the_gradient),
    "before": lambda act: act.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "before, in place": lambda act: act.register_forward_pre_hook(lambda module, args: changes_in_place(0, 0, args[0])),
    "before, by keyword": lambda act: act.register_forward_pre_hook(
        lambda module, args, kwargs: ((), {"input": 2 * args[0]}), with_kwargs=True
    ),
    "backward": lambda act: act.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],)),
    "backward, before": lambda act: act.register_full_backward_pre_hook(lambda module, dy: (2 * dy[0],)),
}


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(inplace=True), nn.LeakyReLU(0.2)], ids=repr)
@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_on_an_activation_sees_and_does_what_it_does_in_stock(act, name, when, x, train_alike):
    if "backward" in name and getattr(act, "inplace", False):
        pytest.skip("stock raises")
    stock, ours = around(copy.deepcopy(act)), around(copy.deepcopy(act))
    handles = [HOOKS[name](stock[1])]
    if when == "before":
        handles.append(HOOKS[name](ours[1]))
    invact.patch(ours, (x,))
    if when == "after":
        assert isinstance(ours[1], Patched)
        handles.append(HOOKS[name](ours[1]))
    train_alike(stock, ours)
    for handle in handles:
        handle.remove()
    train_alike(stock, ours)


def test_outputs_that_a_hook_keeps_can_be_in_the_loss_and_keep_their_gradients(x):
    results = []
    for model in pair(around(nn.GELU()), x):
        seen = []
        model[1].register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        torch.manual_seed(2)
        loss = model(x).pow(2).mean() + seen[0].abs().mean()
        seen[0].retain_grad()
        loss.backward()
        results.append((seen[0].grad, model[0].weight.grad))
    for stock, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)


def test_a_later_hook_of_another_module_that_changes_our_output_in_place_is_met_by_autograds_own_error(x):
    _, ours = pair(around(nn.GELU()), x)
    ours[2].register_forward_pre_hook(lambda module, args: changes_in_place(0, 0, args[0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ours.train()(x).sum().backward()


def test_a_hook_that_changes_in_place_is_right_in_torch_func_too(x):
    def gradients(model):
        model[1].register_forward_hook(changes_in_place)
        loss = lambda parameters, x: functional_call(model, parameters, (x,)).pow(2).mean()  # noqa: E731
        parameters = dict(model.named_parameters())
        return {**grad(loss)(parameters, x), "each": vmap(grad(loss), (None, 0))(parameters, x)["0.bias"]}

    stock, ours = (gradients(model) for model in pair(around(nn.GELU()), x))
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-4, atol=1e-6)


def test_accelerates_hooks_come_and_go(x, train_alike):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Doubles(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    for model, part in ((around(nn.GELU()), "1"), (Written(), "")):
        stock, ours = pair(model, x)
        for each in (stock, ours):
            add_hook_to_module(each.get_submodule(part), Doubles())
        train_alike(stock, ours)
        invact.unpatch(ours)
        train_alike(stock, ours)
        for each in (stock, ours):
            remove_hook_from_module(each.get_submodule(part))
        train_alike(stock, ours)


# --- calls and references -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda act, h: act(input=h),
        lambda act, h: act.forward(h),
        lambda act, h: functools.partial(act)(h),
        lambda act, h: type(act).forward(act, h),
        lambda act, h: nn.GELU.forward(act, h),
        lambda act, h: nn.Module.__call__(act, h),
        lambda act, h: act(h.long()),
        lambda act, h: act(h, h),
        lambda act, h: act(),
        lambda act, h: act(h, other=1),
        lambda act, h: act(h.to_mkldnn()).to_dense(),
        lambda act, h: act(h.to_sparse()),
        lambda act, h: act(torch.complex(h, h)),
    ],
)
def test_any_way_of_calling_an_activation_gives_what_stock_gives_or_says_what_stock_says(call, x):
    results = []
    for model in pair(around(nn.GELU()), x):
        try:
            results.append(torch.autograd.grad(call(model[1], model[0](x)).square().sum(), model[0].weight)[0])
        except Exception as error:
            results.append(str(error).partition("[")[0][:60])
    stock, ours = results
    assert type(stock) is type(ours)
    assert torch.allclose(ours, stock, rtol=1e-4, atol=1e-5) if isinstance(stock, torch.Tensor) else ours == stock


class ReachedInManyWays(Written):
    def __init__(self):
        super().__init__()
        self.act = nn.GELU()
        act = self.act
        self.ways = [act, functools.partial(act), act.forward, lambda h: act(h), {"act": act}["act"]]

    def forward(self, x):
        return sum(self.down(way(self.up(x))) for way in self.ways)


def test_an_activation_reached_in_many_ways_is_one_and_the_same(x, train_alike):
    stock, ours = ReachedInManyWays(), ReachedInManyWays()
    assert [site.path for site in invact.patch(ours, (x,)).inverted] == ["act"]
    train_alike(stock, ours)
    invact.unpatch(ours)
    assert type(ours.act) is nn.GELU
    train_alike(stock, ours)


def test_a_forward_put_on_the_instance_and_taken_off_again(x, train_alike):
    stock, ours = pair(around(nn.GELU()), x)
    for act in (stock[1], ours[1]):
        original = act.forward
        act.forward = lambda h, original=original: 2 * original(h)
    train_alike(stock, ours)
    for act in (stock[1], ours[1]):
        del act.forward
    train_alike(stock, ours)
    for act in (stock[1], ours[1]):
        act.forward = act.forward  # as those do who put the original back
    train_alike(stock, ours)
    invact.unpatch(ours)
    train_alike(stock, ours)


def test_modules_taken_out_or_exchanged_inside_a_block_are_given_back(x):
    model = around(nn.GELU())
    act = model[1]
    with invact.patched(model, (x,)):
        model[1] = nn.ReLU()
        other = nn.Sequential(act)
        assert isinstance(other[0], Patched)
    assert type(other[0]) is nn.GELU
    assert type(model[1]) is nn.ReLU


def test_a_block_within_a_block_gives_back_only_its_own(x):
    model = nn.Sequential(around(nn.GELU()), around(nn.SiLU()))
    patched = lambda: [isinstance(block[1], Patched) for block in model]  # noqa: E731
    with invact.patched(model[0], (x,)):
        with invact.patched(model, (x,)):
            assert patched() == [True, True]
        assert patched() == [True, False]
    assert patched() == [False, False]
