"""The trimodal model without adapters: built from any towers, saved, loaded, trained, and blind to padding."""

import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, CLIPConfig, CLIPModel
from transformers.modeling_layers import GradientCheckpointingLayer
from trimodal_families import (
    BATCH,
    FAMILIES,
    FRAMES,
    IMAGE,
    PICTURE,
    SIZES,
    TOKENS,
    VOCAB,
    enable_checkpointing,
    tower,
    tower_inputs,
)
from trimodal_models import DIM, NAMES, fused, inputs_of, model_of

from peft_read import TrimodalConfig, TrimodalForSequenceClassification, TrimodalModel


# Some DeBERTa's code is scripted.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@pytest.mark.parametrize("names", [NAMES, ("vit", "ast"), ("ast", "bert"), ("vit", "bert")], ids="-".join)
@torch.no_grad()
def test_towers_run_as_they_run_alone(names):
    """Each tower's own output object, and one vector of all."""
    model = model_of(names)
    outputs = model(**inputs_of(names))
    assert outputs.pooler_output.shape == (BATCH, DIM)
    for name in names:
        alone = tower(name)(**tower_inputs(name))
        own = outputs[f"{FAMILIES[name].modality}_model_output"]
        assert type(own) is type(alone)
        assert torch.equal(own.last_hidden_state, alone.last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_fits(family, tmp_path):
    """Any tower beside any other: it runs, and comes back from a file as the class that it was."""
    partner = "bert" if FAMILIES[family].modality != "text" else "vit"
    names = (family, partner)
    model = model_of(names)
    inputs = inputs_of(names)
    expected = fused(model.requires_grad_(False), **inputs)
    assert expected.shape == (BATCH, DIM)
    assert expected.isfinite().all()
    model.save_pretrained(tmp_path)
    # Frozen as the other is: torch may pick another kernel, with other rounding, for gradients.
    loaded = AutoModel.from_pretrained(tmp_path).requires_grad_(False)
    modality = FAMILIES[family].modality
    assert type(loaded) is TrimodalModel
    assert type(loaded.towers()[modality]) is type(tower(family))
    assert torch.equal(fused(loaded, **inputs), expected)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_mean_of_what_is_there_by_hand():
    """The fused vector, from the formula in the docstring, with padding and a sample without text."""
    model = model_of()
    inputs = inputs_of()
    frame_mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    inputs["attention_mask"] = torch.tensor([[1] * 5 + [0] * 4, [0] * 9])
    with torch.no_grad():
        outputs = model(**inputs, frame_mask=frame_mask)
        for row in range(BATCH):
            vision = outputs.vision_model_output.last_hidden_state.unflatten(0, (BATCH, FRAMES))[row]
            sound = outputs.audio_model_output.last_hidden_state[row, 2:].mean(0)
            vectors = {"vision": vision[: 3 if row == 0 else 4].mean((0, 1)), "audio": sound}
            if row == 0:
                vectors["text"] = outputs.text_model_output.last_hidden_state[row, :5].mean(0)
            projected = [model.fusion.projections[m](model.fusion.norms[m](v)) for m, v in vectors.items()]
            expected = model.fusion.norm(torch.stack(projected).mean(0))
            torch.testing.assert_close(outputs.pooler_output[row], expected, rtol=0, atol=1e-5)


def test_padding_changes_nothing():
    """Garbage in padded frames and words, NaN too, doesn't reach the vector: a padded sample is as it is alone."""
    model = model_of(("vit", "wav2vec2", "bert"))
    inputs = inputs_of(("vit", "wav2vec2", "bert"))
    masks = {
        "frame_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
        "audio_mask": (torch.arange(2000) < torch.tensor([[2000], [1200]])).long(),
        "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]),
    }
    inputs |= masks
    expected = fused(model, **inputs)
    other = {name: value.clone() for name, value in inputs.items()}
    other["pixel_values"][1, 2:] = float("nan")
    other["input_values"][1, 1200:] = 7.0
    other["input_ids"][1, 6:] = 9
    torch.testing.assert_close(fused(model, **other), expected, rtol=0, atol=1e-5)
    alone = {
        "pixel_values": inputs["pixel_values"][1:, :2],
        "input_values": inputs["input_values"][1:, :1200],
        "input_ids": inputs["input_ids"][1:, :6],
        "attention_mask": torch.ones(1, 6, dtype=torch.long),
    }
    torch.testing.assert_close(fused(model, **alone)[0], expected[1], rtol=0, atol=1e-5)
    assert (fused(model, **inputs | {"frame_mask": torch.ones(2, 4)})[1] - expected[1]).abs().max() > 1e-3


@pytest.mark.parametrize("missing", ["vision", "audio", "text"])
@pytest.mark.parametrize("names", [NAMES, ("timesformer", "wav2vec2", "roberta")], ids="-".join)
def test_a_modality_that_is_absent_is_one_that_is_masked_out(missing, names):
    model = model_of(names)
    inputs = inputs_of(names)
    full = fused(model, **inputs)
    keys = {"vision": ["pixel_values"], "audio": ["input_values"], "text": ["input_ids", "attention_mask"]}[missing]
    absent = fused(model, **{name: value for name, value in inputs.items() if name not in keys})
    mask_name = {"vision": "frame_mask", "audio": "audio_mask", "text": "attention_mask"}[missing]
    steps = inputs[keys[0]].shape[1]
    mask = torch.zeros(BATCH, steps, dtype=torch.long)
    torch.testing.assert_close(fused(model, **inputs | {mask_name: mask}), absent, rtol=0, atol=1e-6)
    mask[0] = 1
    mixed = fused(model, **inputs | {mask_name: mask})
    torch.testing.assert_close(mixed[1], absent[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[0], full[0], rtol=0, atol=1e-6)
    assert (full - absent).abs().max() > 1e-2


def test_one_tower_is_refused():
    with pytest.raises(ValueError, match=r"joins at least two towers, got \['text'\]"):
        TrimodalModel.from_pretrained_towers(text=tower("bert"))
    with pytest.raises(ValueError, match="got none"):
        TrimodalModel(TrimodalConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": torch.zeros(2, 3, IMAGE, IMAGE)}, r"must be \(batch, frames, channels, height, width\)"),
        ({"pixel_values": torch.zeros(3, 4, 3, IMAGE, IMAGE)}, "same number of samples; got {'vision': 3, 'audio': 2"),
        ({"frame_mask": torch.ones(2, 3)}, r"mask of the vision tower has the shape \(2, 3\), expected \(2, 4\)"),
        ({"audio_mask": torch.ones(2, 15)}, r"mask of the audio tower has the shape \(2, 15\), expected \(2, 64\)"),
        ({"input_values": None, "input_features": torch.zeros(2, 64, 16)}, "takes `input_values`, not"),
        ({"inputs_embeds": torch.zeros(2, 9, 32)}, "Give either of"),
        ({"input_values": None, "audio_mask": torch.ones(2, 64)}, "a mask for the audio tower, but no input"),
    ],
)
def test_bad_inputs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        model_of()(**inputs_of() | changes)


def test_inputs_without_a_tower_and_nothing_at_all_are_refused():
    model = model_of(("vit", "bert"))
    with pytest.raises(ValueError, match="has no audio tower"):
        model(**inputs_of())
    with pytest.raises(ValueError, match="got nothing"):
        model()


def test_towers_come_from_folders_and_from_larger_models(tmp_path):
    """A side of a dual encoder, the encoder of a speech model, a folder: the same weights each way."""
    sides = SIZES | {"projection_dim": 8}
    clip = CLIPModel(CLIPConfig(vision_config=sides | PICTURE, text_config=sides | TOKENS, projection_dim=8)).eval()
    clip.save_pretrained(tmp_path / "clip")
    name = FAMILIES["whisper"].model.partition(".")[0]
    import transformers

    whisper = getattr(transformers, name)(tower("whisper").config).eval()
    whisper.save_pretrained(tmp_path / "whisper")
    tower("bert").save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    given = TrimodalModel.from_pretrained_towers(clip, whisper, tower("bert"))
    torch.manual_seed(0)
    loaded = TrimodalModel.from_pretrained_towers(*(str(tmp_path / n) for n in ("clip", "whisper", "bert")))
    for modality in ("vision", "audio", "text"):
        ours, theirs = given.towers()[modality], loaded.towers()[modality]
        assert type(ours).__name__ == type(theirs).__name__
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    assert type(given.audio_model).__name__ == "WhisperEncoder"
    both = TrimodalModel.from_pretrained_towers(vision=str(tmp_path / "clip"), text=str(tmp_path / "clip"))
    assert type(both.text_model).__name__ == "CLIPTextModel"


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="vision tower must be a model of transformers"):
        TrimodalModel.from_pretrained_towers(vision=nn.Linear(1, 1), text=tower("bert"))


def test_given_weights_stay():
    """Also those of modules that somebody has put into a tower since, which transformers doesn't know."""
    bert = tower("bert")
    bert.encoder.layer[0].output.dense = nn.Linear(64, 32)
    expected = {name: value.clone() for name, value in bert.state_dict().items()}
    model = TrimodalModel.from_pretrained_towers(vision=tower("vit"), text=bert)
    assert model.text_model is bert
    assert all(torch.equal(value, expected[name]) for name, value in bert.state_dict().items())


def test_layerdrop_is_switched_off_with_a_warning():
    speech, reader = tower("wav2vec2"), tower("bart")
    speech.config.layerdrop = 0.1
    reader.layerdrop = 0.2
    with pytest.warns(
        UserWarning, match=r"tower would leave out blocks at random in training \(layerdrop\)"
    ) as caught:
        model = TrimodalModel.from_pretrained_towers(audio=speech, text=reader)
    assert len(caught) == 2
    assert model.config.audio_config.layerdrop == 0
    assert reader.layerdrop == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrimodalModel(model.config)


def test_half_precision_round_trip(tmp_path):
    model = model_of(cls=TrimodalForSequenceClassification, num_labels=3).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    outputs = loaded(**inputs_of())
    assert outputs.logits.dtype == torch.bfloat16
    assert torch.equal(outputs.logits, model(**inputs_of()).logits)
    towers = {"vision": tower("vit").to(torch.bfloat16), "text": tower("bert").to(torch.bfloat16)}
    assert TrimodalModel.from_pretrained_towers(**towers).fusion.norm.weight.dtype == torch.bfloat16


def test_tuples_have_the_loss_first():
    model = model_of(cls=TrimodalForSequenceClassification, num_labels=3)
    outputs = model(**inputs_of(), labels=torch.tensor([0, 1]))
    as_tuple = model(**inputs_of(), labels=torch.tensor([0, 1]), return_dict=False)
    assert torch.equal(as_tuple[0], outputs.loss)
    assert torch.equal(as_tuple[1], outputs.logits)
    assert isinstance(as_tuple[3], tuple)


def test_hidden_states_and_attentions_of_the_towers():
    model = model_of()
    model.set_attn_implementation("eager")
    outputs = model(**inputs_of(), output_hidden_states=True, output_attentions=True)
    for own in (outputs.vision_model_output, outputs.audio_model_output, outputs.text_model_output):
        assert len(own.hidden_states) == 5
        assert len(own.attentions) == 4


@pytest.mark.parametrize("names", [NAMES, ("swin", "wav2vec2", "bert"), ("timesformer", "whisper")], ids="-".join)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(names, use_reentrant):
    """The gradients of frozen towers' trained parts are those without it, also where checkpoints are reentrant."""
    if use_reentrant and "__call__" in vars(GradientCheckpointingLayer):
        pytest.skip("hooks on blocks are inside of this version's checkpoints")

    def gradients(checkpointed):
        model = model_of(names).train()
        for part in model.towers().values():  # as adapters: something inside is trained, the first weights aren't
            for name, parameter in part.named_parameters():
                parameter.requires_grad_("layernorm" in name.lower() or "layer_norm" in name)
        if checkpointed:
            enable_checkpointing(model, use_reentrant)
            model.enable_input_require_grads()
        (model(**inputs_of(names)).pooler_output * torch.linspace(-1, 1, DIM)).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
        actual = gradients(True)
    blocks = [name for name in expected if ".0." in name or ".1." in name]
    assert len(blocks) > 3
    for name in blocks:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)


def test_embeddings_are_those_of_the_text_tower():
    model = model_of()
    assert model.get_input_embeddings() is model.text_model.embeddings.word_embeddings
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    assert model.text_model.embeddings.word_embeddings.weight.shape[0] == VOCAB + 3
    assert model.config.text_config.vocab_size == VOCAB + 3
    embeds = model.get_input_embeddings()(inputs_of()["input_ids"])
    inputs = inputs_of()
    expected = fused(model, **inputs)
    del inputs["input_ids"]
    assert torch.equal(fused(model, **inputs, inputs_embeds=embeds), expected)
    with pytest.raises(NotImplementedError, match="has no text tower"):
        model_of(("vit", "ast")).get_input_embeddings()


def test_blocks_that_must_not_be_split_are_those_of_the_towers():
    assert {"ViTLayer", "ASTLayer", "BertLayer"} <= set(model_of()._no_split_modules)
