"""Real models in small configurations: bytes as said, outputs and gradients as before, and all undone by unpatch."""

import pytest
import torch
from small_models import small_model
from torch.utils._pytree import tree_map

import invact


def tokens(*shape):
    return torch.randint(0, 100, shape)


def bert():
    return small_model("BertForMaskedLM", intermediate_size=256), {"input_ids": tokens(4, 32)}, 3


def vit():
    model = small_model("ViTForImageClassification", intermediate_size=256, patch_size=4)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}, 2


def clip():
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=CLIPTextConfig(vocab_size=100, max_position_embeddings=16, **sizes).to_dict(),
        vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **sizes).to_dict(),
    )
    return CLIPModel(config), {"input_ids": tokens(2, 16), "pixel_values": torch.randn(2, 3, 32, 32)}, 4


def gpt2():
    return small_model("GPT2LMHeadModel"), {"input_ids": tokens(4, 32)}, 2


def mistral():
    return small_model("MistralForCausalLM", intermediate_size=192), {"input_ids": tokens(2, 32)}, 2


def timm_vit():
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10, drop_path_rate=0.1, proj_drop_rate=0.0
    )
    return model, (torch.randn(2, 3, 64, 64),), 2


def timm_convnext():
    import timm

    model = timm.create_model("convnext_atto", depths=(1, 1, 2, 1), num_classes=10)
    return model, (torch.randn(2, 3, 64, 64),), 5


def timm_efficientnet():
    import timm

    model = timm.create_model("test_efficientnet", num_classes=10)
    return model, (torch.randn(2, 3, 64, 64),), 10  # of 13


def open_clip_vit():
    import open_clip

    model = open_clip.model.CLIP(
        64, {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
        {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2},
    )  # fmt: skip
    return model, (torch.randn(2, 3, 32, 32), tokens(2, 16)), 4


def llama():
    model = small_model("LlamaForCausalLM", attention_dropout=0.1, use_cache=True)
    return model, {"input_ids": tokens(2, 32)}, 2


def t5():
    model = small_model("T5ForConditionalGeneration", feed_forward_proj="gated-gelu")
    return model, {"input_ids": tokens(2, 32), "decoder_input_ids": tokens(2, 16)}, 4


def modern_bert():
    sizes = {"intermediate_size": 96, "num_hidden_layers": 3, "attention_dropout": 0.1, "mlp_dropout": 0.1}
    return small_model("ModernBertForMaskedLM", **sizes), {"input_ids": tokens(2, 32)}, 0


def eva02():
    import timm

    model = timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=2, num_classes=10, drop_path_rate=0.1)
    return model, (torch.randn(2, 3, 56, 56),), 2


def lora():
    from peft import LoraConfig, get_peft_model

    model, inputs, _ = llama()
    return get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")), inputs, 0


MODELS = [bert, vit, clip, gpt2, mistral, timm_vit, timm_convnext, timm_efficientnet, open_clip_vit]
ALL_MODELS = [*MODELS, llama, t5, modern_bert, eva02, lora]


def changed(report):
    """The sites whose input is not kept any more; where there are few elements, they are derived."""
    return [site for site in report.sites if site.action != "keep"]


def accounted_for(report):
    """Bytes that the report puts down to what is inverted and what is derived."""
    return sum(site.bytes_saved for site in report.inverted) + sum(tensor.bytes_saved for tensor in report.derived)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_patching_a_real_model_saves_what_it_says_and_changes_no_result(make, count_kept, run_backward):
    model, inputs, sites = make()
    model.train()
    kept_before = count_kept(model, inputs)
    output_before, gradient_before = run_backward(model, inputs)

    report = invact.patch(model, inputs)
    assert len(changed(report)) >= sites
    assert report.saving > 0
    assert report.bytes_before == pytest.approx(kept_before, rel=0.01)
    assert report.bytes_after == pytest.approx(count_kept(model, inputs), rel=0.01)
    assert report.bytes_floor <= report.bytes_after
    assert accounted_for(report) == report.bytes_before - report.bytes_after

    output, gradient = run_backward(model, inputs)
    torch.testing.assert_close(output, output_before, rtol=1e-5, atol=1e-5)
    assert (gradient - gradient_before).norm() < 1e-4 * gradient_before.norm()

    assert invact.unpatch(model) == len(report.inverted)
    assert torch.equal(run_backward(model, inputs)[1], gradient_before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", ALL_MODELS, ids=lambda make: make.__name__)
def test_exact_learns_bit_for_bit_what_stock_does_and_saves_what_it_says(make, dtype, count_kept, run_backward):
    model, inputs, _ = make()
    model.to(dtype).train()
    inputs = tree_map(lambda value: value.to(dtype) if value.is_floating_point() else value, inputs)
    kept_before, expected = count_kept(model, inputs), run_backward(model, inputs)

    report = invact.patch(model, inputs, exact=True)
    assert not report.inverted
    assert report.saving > 0
    assert report.bytes_before == pytest.approx(kept_before, rel=0.01)
    assert report.bytes_after == pytest.approx(count_kept(model, inputs), rel=0.01)
    assert report.bytes_floor <= report.bytes_after
    assert accounted_for(report) == report.bytes_before - report.bytes_after

    for ours, stock in zip(run_backward(model, inputs), expected, strict=True):
        assert torch.equal(ours, stock)
    assert invact.unpatch(model) == 0
    for ours, stock in zip(run_backward(model, inputs), expected, strict=True):
        assert torch.equal(ours, stock)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_model_left_in_evaluation_mode_is_planned_and_trained_so(make, run_backward, run_forward, count_kept):
    """As `from_pretrained` returns it. Without a gradient it computes bit for bit what it did."""
    model, inputs, sites = make()
    model.eval()
    kept_before, (output, gradient) = count_kept(model, inputs), run_backward(model, inputs)
    report = invact.patch(model, inputs)
    assert not model.training
    assert len(changed(report)) >= sites
    assert report.bytes_before == pytest.approx(kept_before, rel=0.01)
    assert report.bytes_after == pytest.approx(count_kept(model, inputs), rel=0.01)
    patched_output, patched_gradient = run_backward(model, inputs)
    torch.testing.assert_close(patched_output, output, rtol=1e-5, atol=1e-5)
    assert (patched_gradient - gradient).norm() < 1e-4 * gradient.norm()
    with torch.no_grad():
        patched = run_forward(model, inputs)
        invact.unpatch(model)
        assert all(torch.equal(a, b) for a, b in zip(run_forward(model, inputs), patched, strict=True))


def test_the_ways_to_patch_agree(run_backward):
    """A model patched with the inputs that its library's patcher makes is patched at the same sites."""
    for make in (bert, gpt2, timm_convnext, open_clip_vit):
        model, inputs, _ = make()
        given = invact.plan(model, inputs)
        made = invact.plan(model)
        assert [(s.path, s.action) for s in made.sites] == [(s.path, s.action) for s in given.sites]


@pytest.mark.parametrize("padded", [False, True], ids=["masks nothing", "masks padding"])
def test_an_attention_mask_counts_as_it_does_on_real_tensors(padded, count_kept):
    model, inputs, _ = bert()
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, 20:] = 1 - padded
    inputs["attention_mask"] = mask
    assert invact.plan(model, inputs).bytes_before == pytest.approx(count_kept(model.train(), inputs), rel=0.001)


@pytest.mark.parametrize("packed", [False, True], ids=["one text a row", "two texts in a row"])
def test_positions_count_as_on_real_tensors_where_a_decoder_keeps_no_cache(packed, count_kept):
    """Without a cache, as in training, transformers looks whether the positions begin anew in the middle of a row."""
    model = small_model("LlamaForCausalLM").train()
    inputs = {"input_ids": torch.randint(0, 100, (2, 32))}
    assert invact.plan(model, inputs).bytes_before == count_kept(model, inputs)
    inputs["position_ids"] = (torch.arange(32) % (16 if packed else 32)).expand(2, 32)
    assert invact.plan(model, inputs).bytes_before == count_kept(model, inputs)
