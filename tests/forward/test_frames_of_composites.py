"""Recurrence over frames inside of models that are given videos: their frames are those of the configuration."""

import pytest
import torch
from helpers import CLOSE, adapter_parameters, enable_checkpointing, strengthen
from models import HEADS, WIDE, WIDTH, bert_config, vit_config
from peft import get_peft_model
from transformers import (
    BertModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    ViTModel,
    XCLIPConfig,
    XCLIPModel,
)

from peft_read import ReadConfig


FRAMES, IMAGE_TOKEN = 4, 59
SIZE = {"hidden_size": WIDTH, "intermediate_size": WIDE, "num_hidden_layers": 2, "num_attention_heads": HEADS}


def smolvlm():
    torch.manual_seed(0)
    text = SIZE | {"model_type": "llama", "vocab_size": 60, "num_key_value_heads": HEADS, "pad_token_id": 0}
    vision = SIZE | {"image_size": 16, "patch_size": 4}
    config = SmolVLMConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, scale_factor=2, pad_token_id=0
    )
    model = SmolVLMForConditionalGeneration(config).eval().requires_grad_(False)
    read = ReadConfig(r=4, recur_over="frames", num_frames=FRAMES, target_modules=r".*vision_model.*fc2")
    return strengthen(get_peft_model(model, read)).eval()


def videos(*lengths, room=None):
    """Padded on the right by blank frames, as its processor pads them; the text says how many there are."""
    room, generator = room or max(lengths), torch.Generator().manual_seed(1)
    pixels = torch.zeros(len(lengths), room, 3, 16, 16)
    ids = torch.zeros(len(lengths), 4 * room + 2, dtype=torch.long)
    for row, length in enumerate(lengths):
        pixels[row, :length] = torch.randn(length, 3, 16, 16, generator=generator)
        ids[row, -4 * length - 2 :] = torch.tensor([IMAGE_TOKEN] * 4 * length + [5, 6])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


@torch.no_grad()
def test_whole_videos():
    """Each is as alone, whatever else is in the batch."""
    model, batch = smolvlm(), videos(FRAMES, FRAMES)
    together = model(**batch).logits
    for row in range(2):
        alone = model(**{name: value[row : row + 1] for name, value in batch.items()}).logits
        torch.testing.assert_close(together[row], alone[0], **CLOSE)


@pytest.mark.parametrize("lengths", [(4, 3), (2, 6), (2, 2), (6, 6), (3, 5)])
@pytest.mark.parametrize("through", ["a call", "the head's features", "the model's features"])
@torch.no_grad()
def test_videos_of_other_lengths_are_refused(lengths, through):
    """Also where as many frames as in whole videos are left after padding was taken out."""
    model, batch = smolvlm(), videos(*lengths)
    base, pixels = model.get_base_model(), batch["pixel_values"]
    run = {
        "a call": lambda: model(**batch),
        "the head's features": lambda: base.get_image_features(pixel_values=pixels),
        "the model's features": lambda: base.model.get_image_features(pixels),
    }[through]
    with pytest.raises(ValueError, match=r"videos? of \d frames"):
        run()


@torch.no_grad()
def test_blank_frames_are_told():
    """The model leaves them out, and says nothing."""
    batch = videos(FRAMES, FRAMES)
    batch["pixel_values"][0, 2] = 0
    with pytest.raises(ValueError, match=r"of 2 videos of 4 frames it sees 7 images.*SmolVLM.*blank"):
        smolvlm()(**batch)


@torch.no_grad()
def test_a_dual_encoder_of_videos():
    """X-CLIP's vision tower: as many frames as it was made for."""
    torch.manual_seed(0)
    vision = SIZE | {"image_size": 8, "patch_size": 4, "num_frames": FRAMES, "mit_hidden_size": WIDTH}
    vision |= {"mit_intermediate_size": WIDE, "mit_num_attention_heads": HEADS, "mit_num_hidden_layers": 1}
    text = SIZE | {"vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 49}
    sides = {"text_config": text, "vision_config": vision}
    config = XCLIPConfig(**sides, projection_dim=WIDTH, prompt_num_attention_heads=HEADS)
    read = ReadConfig(r=4, recur_over="frames", num_frames=FRAMES, target_modules=r"vision_model\..*mlp\.fc2")
    model = strengthen(get_peft_model(XCLIPModel(config).eval(), read)).eval()
    pixels = torch.randn(2, FRAMES, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    features = [model.get_base_model().get_video_features(part) for part in (pixels, pixels[1:])]
    first, second = (getattr(given, "pooler_output", given) for given in features)
    torch.testing.assert_close(first[1:], second, **CLOSE)
    with pytest.raises(ValueError, match="given videos of 2 frames"):
        model.get_base_model().get_video_features(pixels[:, :2])


@torch.no_grad()
def test_a_frames_padding_changes_no_other_frame():
    """A mask of tokens counts for the recurrence over frames: at a padded place a video's state stays as it was."""
    config = ReadConfig(r=4, cell="gru", recur_over="frames", num_frames=2, target_modules=r".*output\.dense")
    torch.manual_seed(0)
    model = strengthen(get_peft_model(BertModel(bert_config()), config)).eval()
    ids = torch.randint(3, 49, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    other = ids.clone()
    other[0, 3:] = 7
    first, second = (model(input_ids=given, attention_mask=mask).last_hidden_state for given in (ids, other))
    torch.testing.assert_close(first[1], second[1], **CLOSE)
    unmasked = model(input_ids=other).last_hidden_state
    assert (unmasked[1] - second[1]).abs().max() > 1e-3


@torch.no_grad()
def test_pictures_without_an_axis_of_frames():
    """An image tower alone says nothing of videos: whole ones are right."""
    torch.manual_seed(0)
    config = ReadConfig(r=4, recur_over="frames", num_frames=2)
    model = strengthen(get_peft_model(ViTModel(vit_config(), add_pooling_layer=False), config)).eval()
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    whole, half = (model(pixel_values=given).last_hidden_state for given in (pixels, pixels[2:]))
    torch.testing.assert_close(whole[2:], half, **CLOSE)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_tower_of_a_composite_alone_under_checkpointing(use_reentrant):
    """Its blocks are computed again while no model around it runs: the gradients are those without that."""

    def gradients(model):
        pixels = videos(FRAMES)["pixel_values"][0].requires_grad_()
        tower = model.train().get_base_model().model.vision_model
        tower(pixels).last_hidden_state.square().mean().backward()
        return {name: parameter.grad for name, parameter in adapter_parameters(model).items()}

    expected, model = gradients(smolvlm()), smolvlm()
    enable_checkpointing(model, use_reentrant)
    for name, gradient in gradients(model).items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)
