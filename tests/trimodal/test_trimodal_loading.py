"""Towers by name and by object: the checkpoint's weights, all of them, or an error."""

import pytest
import torch
import transformers
from checkpoints import CHECKPOINTS, checkpoint
from peft import get_peft_model
from torch import nn
from trimodal_families import tower

from peft_read import LsttaConfig, TrimodalForSequenceClassification, TrimodalModel
from peft_read.trimodal.inputs import TrimodalInputs
from peft_read.trimodal.loading import load_language_model, load_tower


pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
PARTS = [(name, modality) for name, known in CHECKPOINTS.items() for modality in known.parts]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a checkpoint, saved once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def save(name):
        if not (folder / name).is_dir():
            checkpoint(name).save_pretrained(folder / name)
        return folder / name

    return save


def expected_of(name, model):
    """The weights of a tower, as its own checkpoint class loads them."""
    return {mod: model.get_submodule(part).state_dict() for mod, part in CHECKPOINTS[name].parts.items()}


def assert_weights(loaded, expected, without):
    """Each weight is one of the checkpoint's, by the name that it has there or the end of it, and none is missing."""
    found = set()
    for key, value in loaded.state_dict().items():
        same = [k for k in expected if k == key or key.endswith(f".{k}") or k.endswith(f".{key}")]
        if key == "shared.weight":  # T5's embeddings, which its encoder has under another name
            same = ["embed_tokens.weight"]
        assert same, key
        assert any(torch.equal(value, expected[k]) for k in same), key
        found.update(same)
    left = set(expected) - found
    assert not [k for k in left if not k.startswith(without)], left


@pytest.mark.parametrize(("name", "modality"), PARTS, ids="-".join)
def test_weights_are_those_of_the_checkpoint(name, modality, saved):
    """By name and by object, whatever random numbers were drawn before."""
    folder = saved(name)
    known = CHECKPOINTS[name]
    whole = getattr(transformers, known.model).from_pretrained(folder)
    expected = expected_of(name, whole)[modality]
    torch.manual_seed(1)
    assert_weights(load_tower(modality, str(folder)), expected, known.random)
    by_object = load_tower(modality, whole)
    assert any(module is by_object for module in whole.modules())
    assert_weights(by_object, expected, known.random)


def test_a_tower_without_a_pooler_comes_back_without(saved, tmp_path):
    """A masked language model has none: nothing random takes its place, then or after saving."""
    model = TrimodalModel.from_pretrained_towers(vision=str(saved("vit")), text=str(saved("bert")), projection_dim=8)
    assert model.text_model.pooler is None
    model.save_pretrained(tmp_path)
    again = TrimodalModel.from_pretrained(tmp_path)
    assert again.text_model.pooler is None
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_masked_steps_without_an_embedding_are_not_masked(saved, tmp_path):
    """wav2vec2's fine-tuned checkpoints lack what stands for masked steps in training: nothing is masked then."""
    whole = checkpoint("wav2vec2")
    state = {name: value for name, value in whole.state_dict().items() if "masked_spec_embed" not in name}
    whole.save_pretrained(tmp_path, state_dict=state)
    loaded = load_tower("audio", tmp_path)
    assert loaded.config.mask_time_prob == 0
    assert not any("masked_spec_embed" in name for name, _ in loaded.named_parameters())


@pytest.mark.parametrize(("name", "lost"), [("clip", "vision_model.encoder"), ("bert", "bert.encoder.layer.1")])
def test_a_missing_weight_is_an_error(name, lost, tmp_path):
    whole = checkpoint(name)
    state = {key: value for key, value in whole.state_dict().items() if not key.startswith(lost)}
    whole.save_pretrained(tmp_path, state_dict=state)
    modality = "vision" if name == "clip" else "text"
    with pytest.raises(ValueError, match=rf"lacks \d+ of the {modality} tower's weights .* would be random"):
        load_tower(modality, tmp_path)


def test_a_composites_missing_weight_is_an_error(tmp_path):
    model = TrimodalModel.from_pretrained_towers(vision=tower("vit"), text=tower("bert"), projection_dim=8)
    state = {key: value for key, value in model.state_dict().items() if "text_model.encoder.layer.0" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of the towers \(text_model"):
        TrimodalModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "modality"), [("clip", "audio"), ("llava", "audio"), ("whisper", "vision"), ("vit", "text")]
)
def test_a_model_without_such_a_tower_is_refused(name, modality, saved):
    for source in (str(saved(name)), checkpoint(name)):
        with pytest.raises(ValueError, match=f"has no {modality} tower that could stand alone"):
            load_tower(modality, source)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="vision tower must be a model of transformers"):
        load_tower("vision", nn.Linear(1, 1))


def test_language_models(saved):
    loaded = load_language_model(str(saved("t5")))
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in checkpoint("t5").state_dict().items())
    for name in ("bert", "whisper"):
        with pytest.raises(ValueError, match="no encoder-decoder that generates text"):
            load_language_model(str(saved(name)) if name == "bert" else checkpoint(name))
    with pytest.raises(TypeError):
        load_language_model(nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["resnet", "convnext"])
@torch.no_grad()
def test_convolutions_without_adapters(name, saved):
    """They have no tokens that could meet others, and fuse all the same."""
    model = TrimodalForSequenceClassification.from_pretrained_towers(
        vision=str(saved(name)), text=tower("bert"), projection_dim=8
    )
    inputs = {
        "pixel_values": torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        "input_ids": torch.randint(5, 90, (2, 4)),
    }
    states = model.vision_model(inputs["pixel_values"].flatten(0, 1)).last_hidden_state
    mean = states.mean((2, 3)).unflatten(0, (2, 3)).mean(1)
    encoded = model._encode(TrimodalInputs(**inputs))
    torch.testing.assert_close(model._pool(encoded)[0]["vision"], mean)
    with pytest.raises(ValueError, match="No transformer blocks were found"):
        get_peft_model(model, LsttaConfig(r=8, num_heads=2))
