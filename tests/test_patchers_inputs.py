"""Inputs made up for models by what they ask for: real libraries, small configurations, no network."""

from __future__ import annotations

import json

import open_clip
import pytest
import timm
import torch
import transformers
from published_models import PUBLISHED_PARAMETERS
from small_architectures import IMAGE, SMALL_MODELS, TEXT, shapes, small

import invact
from invact import patchers
from invact.patchers.meta import built_on_meta


@pytest.mark.parametrize("architecture", SMALL_MODELS)
def test_inputs_lead_a_transformers_model_to_a_training_graph(architecture):
    model = small(architecture, **SMALL_MODELS[architecture]).train()
    before = torch.get_rng_state()
    inputs = patchers.example_inputs(model, batch_size=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert {shape[0] for shape in shapes(inputs)} == {2}
    output = model(**inputs)
    assert any(t.requires_grad for t in output.values() if isinstance(t, torch.Tensor))


WITH_A_LOSS = {
    "BertForMaskedLM": ["labels"],
    "BertForPreTraining": ["labels", "next_sentence_label"],
    "BertForNextSentencePrediction": ["labels"],
    "BertForSequenceClassification": ["labels"],
    "BertForTokenClassification": ["labels"],
    "BertForQuestionAnswering": ["start_positions", "end_positions"],
    "BertForMultipleChoice": ["labels"],
    "BertLMHeadModel": ["labels"],
    "AlbertForPreTraining": ["labels", "sentence_order_label"],
    "ElectraForPreTraining": ["labels"],
    "XLNetForSequenceClassification": ["labels"],
    "ViTForMaskedImageModeling": ["bool_masked_pos"],
    "SegformerForSemanticSegmentation": ["labels"],
    "CLIPForImageClassification": ["labels"],
    **{name: ["labels"] for name in SMALL_MODELS},
    "CLIPModel": ["return_loss"],
    "SiglipModel": ["return_loss"],
    "ViTMAEForPreTraining": [],  # its loss asks for nothing
}
WITHOUT_A_LOSS = {"T5EncoderModel", "Dinov2Model", "CLIPTextModel", "CLIPVisionModelWithProjection"}
OTHER_FIELDS = {
    **dict.fromkeys([name for name in WITH_A_LOSS if name.startswith(("Bert", "Albert", "Electra"))], TEXT),
    "AlbertForPreTraining": TEXT | {"embedding_size": 16},
    "ElectraForPreTraining": TEXT | {"embedding_size": 16},
    "XLNetForSequenceClassification": {"vocab_size": 100, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32},
    "ViTForMaskedImageModeling": IMAGE | {"encoder_stride": 8},
    "SegformerForSemanticSegmentation": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    | {"decoder_hidden_size": 8, "image_size": 64, "num_attention_heads": [1, 1, 1, 1]},
    "CLIPForImageClassification": {"vision_config": IMAGE, "text_config": TEXT},
}


@pytest.mark.parametrize("architecture", sorted(WITH_A_LOSS.keys() - WITHOUT_A_LOSS))
def test_inputs_lead_a_transformers_model_to_its_loss_if_that_is_wanted(architecture):
    model = small(architecture, **{**SMALL_MODELS, **OTHER_FIELDS}[architecture]).train()
    before = torch.get_rng_state()
    with_loss = patchers.example_inputs(model, batch_size=2)
    without = patchers.example_inputs(model, batch_size=2, loss=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert [name for name in with_loss if name not in without] == WITH_A_LOSS[architecture]
    loss = model(**with_loss).loss
    assert loss.requires_grad
    assert loss.isfinite().all()
    if WITH_A_LOSS[architecture]:
        assert getattr(model(**without), "loss", None) is None


@pytest.mark.parametrize("architecture", sorted(WITHOUT_A_LOSS))
def test_a_model_without_a_head_gets_no_labels(architecture):
    model = small(architecture, **SMALL_MODELS[architecture])
    assert shapes(patchers.example_inputs(model)) == shapes(patchers.example_inputs(model, loss=False))


@pytest.mark.parametrize(
    ("settings", "dtype", "shape"),
    [
        ({"num_labels": 3}, torch.long, (2,)),
        ({"num_labels": 1}, torch.bfloat16, (2,)),
        ({"num_labels": 3, "problem_type": "regression"}, torch.bfloat16, (2, 3)),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.bfloat16, (2, 3)),
    ],
)
def test_labels_are_classes_or_numbers_as_the_configuration_says(settings, dtype, shape):
    model = small("BertForSequenceClassification", **TEXT, **settings).to(torch.bfloat16)
    inputs = patchers.example_inputs(model, batch_size=2)
    assert (inputs["labels"].dtype, inputs["labels"].shape) == (dtype, shape)
    model(**inputs).loss.backward()


def test_planning_with_a_loss_leaves_the_kind_of_problem_open():
    model = small("BertForSequenceClassification", **TEXT).train()
    assert "with its loss" in invact.plan(model).setting
    assert model.config.problem_type is None


# Those read values, which are not to be had on the meta device; the first has its loss above, the others none.
ASK_FOR_VALUES = {"facebook/bart-base", "facebook/wav2vec2-base", "microsoft/deberta-v3-base"}


@pytest.mark.parametrize("name", sorted(PUBLISHED_PARAMETERS.keys() - ASK_FOR_VALUES))
def test_every_bundled_configuration_gives_its_loss(name):
    fields = patchers.huggingface.config_fields(name)
    if fields["model_type"] not in transformers.CONFIG_MAPPING:
        pytest.skip("needs a newer transformers")
    shallow = {key: 1 for key in fields if key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")}
    config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict({**fields, **shallow, "layerdrop": 0.0})
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config).train()
    length = None if model.main_input_name in ("pixel_values", "input_values", "input_features") else 8
    output = model(**patchers.example_inputs(model, 2, length, device="meta"))
    headless = name == "facebook/dinov2-base"
    assert (getattr(output, "loss", None) is None) == headless


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_inputs_lead_a_timm_model_to_a_training_graph(name):
    model = timm.create_model(name).train()
    assert model(*patchers.example_inputs(model, batch_size=2)).requires_grad


def test_inputs_lead_an_open_clip_model_to_a_training_graph():
    model = open_clip.create_model("ViT-B-32").train()
    image_features, text_features, _ = model(*patchers.example_inputs(model, batch_size=2))
    assert image_features.requires_grad
    assert text_features.requires_grad


@pytest.mark.parametrize("kind", ["mt5", "roberta"])
def test_a_text_tower_of_transformers_gets_as_many_tokens_as_open_clips_tokenizer_gives(kind, tmp_path):
    from transformers import MT5Config, RobertaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_config = {
        "mt5": MT5Config(vocab_size=100, d_model=32, d_ff=64, d_kv=16, num_layers=1, num_heads=2),
        "roberta": RobertaConfig(vocab_size=100, max_position_embeddings=80, **sizes),
    }[kind]
    text_config.save_pretrained(tmp_path)
    vision = {"image_size": 64, "layers": 1, "width": 64, "head_width": 32, "patch_size": 32}
    text = {"hf_model_name": str(tmp_path), "hf_tokenizer_name": "", "hf_pooler_type": "mean_pooler"}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False, pretrained_text=False).train()
    assert shapes(patchers.example_inputs(model, batch_size=2)) == [(2, 3, 64, 64), (2, 77)]
    assert shapes(patchers.example_inputs(model, batch_size=2, seq_len=16)) == [(2, 3, 64, 64), (2, 16)]
    assert model(*patchers.example_inputs(model, batch_size=2))[1].requires_grad


def test_inputs_of_a_timm_model_follow_its_own_channels_and_size():
    model = timm.create_model("vit_tiny_patch16_224", in_chans=1, img_size=32)
    assert shapes(patchers.example_inputs(model)) == [(1, 1, 32, 32)]


def test_images_come_in_the_dtype_of_the_model():
    model = small("ViTForImageClassification", **IMAGE).to(torch.bfloat16)
    assert patchers.example_inputs(model)["pixel_values"].dtype is torch.bfloat16


def test_roberta_loses_the_positions_up_to_its_padding_index():
    model = patchers.load("roberta-base")
    assert shapes(patchers.example_inputs(model, loss=False)) == [(1, 512)]
    with pytest.raises(patchers.InputSizeError, match="at most 512 tokens, not 514"):
        patchers.example_inputs(model, seq_len=514)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("gpt2", {"seq_len": 2000}, "at most 1024 tokens"),
        ("gpt2", {"image_size": 224}, "reads no images"),
        ("gpt2", {"batch_size": 0}, "batch size is 0"),
        ("gpt2", {"seq_len": -1}, "sequence length is -1"),
        ("google/vit-base-patch16-224", {"seq_len": 10}, "no sequence length"),
        ("timm/resnet18", {"seq_len": 10}, "no sequence length"),
        ("open_clip/ViT-B-32", {"seq_len": 10}, "exactly 77 tokens"),
        ("openai/whisper-tiny", {"seq_len": 1000}, "at most 448 tokens"),
    ],
)
def test_size_that_the_model_cannot_take_is_refused(name, sizes, message):
    with pytest.raises(patchers.InputSizeError, match=message):
        patchers.example_inputs(patchers.load(name), **sizes)


def test_model_that_mixes_images_into_its_text_asks_for_inputs():
    with torch.device("meta"):
        model = small("LlavaForConditionalGeneration")
    with pytest.raises(patchers.InputSizeError, match="Pass example_inputs"):
        patchers.example_inputs(model)


def test_model_of_no_known_library_asks_for_inputs():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert patchers.library_of(model) is None
    with pytest.raises(patchers.InputSizeError, match="Pass example_inputs"):
        patchers.example_inputs(model)


def test_layer_of_a_library_is_not_taken_for_a_model_of_it():
    assert patchers.library_of(timm.layers.Mlp(4)) is None


def test_subclass_of_a_library_model_belongs_to_the_library():
    class Mine(transformers.BertForMaskedLM):
        pass

    assert patchers.library_of(Mine(transformers.BertConfig(**TEXT))).name == "transformers"


def built_with(forbidden):
    """Builds a module that first does what can not be done, and how often it was built."""
    built = []

    def build():
        built.append(1)
        forbidden()
        return torch.nn.Linear(2, 2)

    return build, built


def test_a_model_that_reads_a_number_off_a_tensor_is_built_with_weights_instead():
    build, built = built_with(lambda: torch.linspace(0, 1, 3)[0].item())
    model = built_on_meta(build, torch.bfloat16)
    assert len(built) == 2
    assert (model.weight.device.type, model.weight.dtype) == ("meta", torch.bfloat16)
    assert torch.get_default_dtype() is torch.float32


def test_another_error_of_building_is_told_at_once():
    def broken():
        raise RuntimeError("sizes do not match")

    build, built = built_with(broken)
    with pytest.raises(RuntimeError, match="sizes do not match"):
        built_on_meta(build, torch.float32)
    assert len(built) == 1
