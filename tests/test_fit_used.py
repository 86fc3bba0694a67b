"""What `invact.fit` fitted is used as ever: unpatched, saved, copied, generated with, and built otherwise."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from described import described
from fitted_models import MODELS, budget_for, gradients
from real_steps import counted_peak
from small_trained import gpt2, inputs_for, llama, sequential
from torch import nn

import invact
from invact.fitting.choosing import fit_in
from invact.planning.plans import decide

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]


# --- gradients ----------------------------------------------------------------------------------------


def fitted(name):
    model = MODELS[name]()
    inputs = inputs_for(model, 16)
    report = invact.fit(model, inputs, memory=budget_for(model, inputs, exact=True), optimizer="sgd", exact=True)
    assert report.blocks
    return model, inputs


# --- other ways of use --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2 with dropout", "vit with dropout"])
def test_unpatch_takes_it_all_back(name):
    model = MODELS[name]()
    inputs, before = inputs_for(model, 16), described(model)
    classes = [type(module) for module in model.modules()]
    assert invact.fit(model, inputs, memory=budget_for(model, inputs), optimizer="sgd").blocks
    assert [type(module) for module in model.modules()] != classes
    invact.unpatch(model)
    assert described(model) == before
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_models_are_saved_copied_and_loaded_as_ever(name):
    model, inputs = fitted(name)
    stock = MODELS[name]()
    stock.load_state_dict(model.state_dict())
    expected = gradients(stock, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(map(torch.equal, gradients(other, inputs), expected))
    assert list(model.state_dict()) == list(stock.state_dict())


@pytest.mark.parametrize("name", ["llama", "vit with dropout"])
def test_results_in_eval_mode_are_stocks(name):
    model, inputs = fitted(name)
    stock = MODELS[name]()
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours, theirs = (loss_of_eval(each, inputs) for each in (model, stock))
    assert torch.equal(ours, theirs)


def loss_of_eval(model, inputs):
    model.eval()
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return getattr(output, "logits", output)


def test_a_model_that_keeps_a_cache_gives_and_generates_as_stock_does():
    """In training what runs twice would write to a cache twice, so the model leaves it out; in eval it stays."""
    model = llama(layers=4, use_cache=True)
    inputs = inputs_for(model, 16)
    stock = copy.deepcopy(model)
    expected = gradients(stock, inputs)
    budget = budget_for(model, inputs, exact=True)
    assert invact.fit(model, inputs, memory=budget, optimizer="sgd", exact=True).blocks
    assert all(map(torch.equal, gradients(model, inputs), expected))
    assert vars(model.model).get("gradient_checkpointing") is vars(stock.model).get("gradient_checkpointing")
    prompt = inputs["input_ids"][:2, :8]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours, theirs = (each.eval().generate(prompt, **options) for each in (model, stock))
    assert torch.equal(ours, theirs)
    assert model(prompt).past_key_values is not None


def test_what_a_user_checkpoints_stays_so_and_is_not_chosen():
    model = gpt2(dropout=0, layers=4)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.transformer.h[1:]:
        layer.gradient_checkpointing = False
    inputs = inputs_for(model, 16)
    expected = gradients(model, inputs)
    budget = budget_for(model, inputs, exact=True)
    report = invact.fit(model, inputs, memory=budget, optimizer="sgd", exact=True)
    assert report.blocks
    assert "transformer.h.0" not in report.checkpointed
    assert counted_peak(copy.deepcopy(model), inputs, "sgd")[0] == report.peak_bytes
    assert all(map(torch.equal, gradients(model, inputs), expected))
    invact.unpatch(model)
    assert [layer.gradient_checkpointing for layer in model.transformer.h] == [True, False, False, False]


def test_a_plain_models_blocks_are_found_by_their_container():
    model = sequential(4)
    inputs = inputs_for(model, 16)
    report = invact.fit(model, inputs, memory=budget_for(model, inputs), optimizer="sgd")
    assert report.checkpointed
    assert set(report.checkpointed) < {"0", "1", "2", "3"}
    assert counted_peak(model, inputs, "sgd")[0] == report.peak_bytes


def test_blocks_with_batch_norm_have_stocks_gradients_and_running_statistics():
    """With PyTorch's checkpointing alone they are counted once more when the block runs once more."""

    def block():
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))

    model, inputs = nn.Sequential(*(block() for _ in range(4))).train(), (torch.randn(4, 8, 16, 16),)
    stock = copy.deepcopy(model)
    expected = gradients(stock, inputs)
    budget = budget_for(model, inputs, 0.9, exact=True)
    assert invact.fit(model, inputs, memory=1 << 20, optimizer="sgd", exact=True).peak_bytes < 1 << 20
    invact.unpatch(model)
    decided = decide(model, inputs, exact=True)
    fit_in(decided, model, inputs, optimizer="sgd", memory=budget)
    assert decided.checkpointed
    with decided.applied(model):
        assert all(map(torch.equal, gradients(model, inputs), expected))
    assert all(map(torch.equal, model.buffers(), stock.buffers()))


@pytest.mark.parametrize("library", [pytest.param("torchvision", marks=pytest.mark.slow), "timm", "open_clip"])
def test_vision_models_of_other_builds_fit(library):
    if library == "torchvision":
        from torchvision.models.swin_transformer import SwinTransformer

        model = SwinTransformer([4, 4], 24, [1, 3, 1], [2, 2, 2], [4, 4], num_classes=4)
        inputs = (torch.randn(4, 3, 64, 64),)
    elif library == "timm":
        import timm

        model = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(1, 3, 1),
            num_heads=(2, 2, 2), num_classes=4,
        )  # fmt: skip
        inputs = (torch.randn(4, 3, 64, 64),)
    else:
        open_clip = pytest.importorskip("open_clip")

        model = open_clip.transformer.VisionTransformer(64, 16, 64, 4, 2, 4.0, output_dim=16)
        inputs = (torch.randn(8, 3, 64, 64),)
    model.train()
    report = invact.fit(model, inputs, memory=budget_for(model, inputs), optimizer="sgd")
    assert report.checkpointed
    assert counted_peak(model, inputs, "sgd")[0] == report.peak_bytes <= report.memory_bytes
