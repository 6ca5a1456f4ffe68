"""Every family's tower: its blocks are found, they can meet without a trace, and where time is in their tokens."""

import pytest
import torch
from meetings import first, watch_blocks
from torch import nn
from transformers import ConvNextConfig, ConvNextModel
from trimodal_families import (
    AUDIO,
    BATCH,
    FAMILIES,
    FRAMES,
    MEL_FRAMES,
    TEXT,
    VISION,
    WORDS,
    sound_inputs,
    tower,
    tower_inputs,
)

from peft_read.architectures.blocks import block_width, blocks_of_levels, find_blocks
from peft_read.lockstep import TowerBatch
from peft_read.lockstep.coroutines import run_in_lockstep
from peft_read.lockstep.layouts import Layout, layout_of, step_mask, takes_videos, token_mask
from peft_read.trimodal.towers import tokens_of


pytestmark = [
    # WavLM passes its two masks in two types.
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning"),
    # Some DeBERTa's code is scripted.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]
EVERY = pytest.mark.parametrize("family", FAMILIES)


def test_the_table_is_as_long_as_promised():
    assert len(VISION) >= 16
    assert len(AUDIO) >= 12
    assert len(TEXT) >= 16


@EVERY
def test_blocks_are_found(family):
    model, known = tower(family), FAMILIES[family]
    names = find_blocks(model)
    assert names == known.block_names
    assert [block_width(model, name) for name in names] == known.block_widths


@EVERY
@torch.no_grad()
def test_meeting_leaves_no_trace(family):
    """In lockstep with others every family gives what it gives alone, bit for bit, and meets at each of its blocks."""
    names = [family, "vit", "bert"]
    towers = [tower(name) for name in names]
    expected = [model(**tower_inputs(name)).last_hidden_state for name, model in zip(names, towers, strict=True)]
    seen: list[list] = [[] for _ in names]
    for model, notes in zip(towers, seen, strict=True):
        watch_blocks(model, notes)
    met = []
    outputs = run_in_lockstep(
        {str(i): lambda i=i: towers[i](**tower_inputs(names[i])) for i in range(len(names))},
        lambda level, hidden: met.append((level, len(hidden))) or hidden,
    )
    for output, alone in zip(outputs.values(), expected, strict=True):
        assert torch.equal(output.last_hidden_state, alone)
    assert met == [(level, 3) for level in range(4)]
    assert [hidden.shape[-1] for hidden in seen[0]] == FAMILIES[family].block_widths


def test_convolutional_towers_are_refused_with_the_way_out():
    model = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))
    with pytest.raises(ValueError, match=r"No transformer blocks .* ConvNextModel. Name them yourself"):
        find_blocks(model)


def test_a_block_without_a_norm_has_no_width():
    with pytest.raises(ValueError, match="width of 0, a Linear"):
        block_width(nn.Sequential(nn.Linear(2, 2)), "0")


@pytest.mark.parametrize(
    ("depth", "levels", "expected"),
    [(12, 6, [1, 3, 5, 7, 9, 11]), (6, 6, [0, 1, 2, 3, 4, 5]), (24, 6, [3, 7, 11, 15, 19, 23]), (5, 2, [1, 4])],
)
def test_levels_end_with_the_last_block(depth, levels, expected):
    assert blocks_of_levels(depth, levels) == expected


@pytest.mark.parametrize("levels", [0, 5])
def test_more_levels_than_blocks_are_refused(levels):
    with pytest.raises(ValueError, match=f"1 to 4 levels, not {levels}"):
        blocks_of_levels(4, levels)


def changed_tokens(model, inputs, changed):
    """Which tokens of what the first block is given change with the input: `(rows, tokens)` bool."""
    seen = []
    handle = model.get_submodule(find_blocks(model)[0]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
        model(**changed)
    handle.remove()
    return (seen[0] != seen[1]).any(-1)


STEPS_OF_FRAME = {"videomae": 2, "vivit": 2, "vjepa2": 2}


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("frame", range(FRAMES))
def test_a_frame_changes_its_own_tokens(family, frame):
    """The layout puts exactly those tokens at a time step that one frame's pixels go into."""
    model = tower(family)
    inputs = tower_inputs(family)
    ((name, pixels),) = inputs.items()
    other = pixels.clone()
    other.view(BATCH, FRAMES, *pixels.shape[-3:])[1, frame] += 1.0
    changed = changed_tokens(model, inputs, {name: other})
    batch = TowerBatch.of("vision", model, BATCH, FRAMES)
    assert takes_videos(model) == (pixels.ndim == 5)
    timed, untimed = batch.split(changed[..., None])
    expected = torch.zeros(BATCH, FRAMES // STEPS_OF_FRAME.get(family, 1), dtype=torch.bool)
    expected[1, frame // STEPS_OF_FRAME.get(family, 1)] = True
    assert torch.equal(timed[..., 0].any(2), expected)
    assert untimed is None or not untimed.any()
    assert torch.equal(batch.join(timed, untimed, changed[..., None].shape)[..., 0], changed)
    assert torch.equal(
        step_mask(model, expected.repeat_interleave(STEPS_OF_FRAME.get(family, 1), 1), expected.shape[1]), expected
    )


TAKES_MASK = ["wav2vec2", "hubert", "wavlm", "unispeech_sat", "data2vec_audio", "sew", "moonshine", "parakeet"]
TAKES_MASK += ["wav2vec2_bert"]


@pytest.mark.parametrize("family", AUDIO)
def test_later_sound_changes_later_tokens(family):
    """A change at the start of the sound leaves the last time steps alone, one at the end the first."""
    model = tower(family)
    inputs = sound_inputs(family)
    ((name, sound),) = inputs.items()
    axis = 2 if FAMILIES[family].inputs in ("mels", "mel_image") else 1
    length = sound.shape[axis]
    seen = []
    # Convolutions over tokens, and normalisation over time, look further than a token's own sound.
    model.get_submodule(find_blocks(model)[0]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = TowerBatch.of("audio", model, BATCH, length)
    for start in (0, length - length // 8):
        other = sound.clone()
        other.narrow(axis, start, length // 8).mul_(-3.0)
        with torch.no_grad():
            model(**inputs)
            model(**{name: other})
        before, after = seen
        timed, _ = batch.split((before - after).abs())
        difference = timed.sum((0, 2, 3))
        centre = (difference * torch.arange(len(difference))).sum() / difference.sum() / (len(difference) - 1)
        assert centre < 0.45 if start == 0 else centre > 0.55
        seen.clear()


@pytest.mark.parametrize("frame", [0, 100, 130, 255])
def test_pieces_of_a_spectrogram_are_put_in_order(frame):
    """CLAP's square image of 64 x 64 holds 256 frames in four rows of pieces: one frame of 256 changes, exactly."""
    model = tower("clap_audio")
    inputs = sound_inputs("clap_audio")
    other = inputs["input_features"].clone()
    other[0, :, frame] += 1.0  # patches of 4 frames and 4 bands
    changed = changed_tokens(model, inputs, {"input_features": other})
    batch = TowerBatch.of("audio", model, BATCH, 256)
    timed, untimed = batch.split(changed[..., None])
    assert timed.shape == (BATCH, 64, 4, 1)
    assert timed[0, :, :, 0].all(1).nonzero().flatten().tolist() == [frame // 4]
    assert timed.sum() == 4
    assert untimed is None
    assert torch.equal(batch.join(timed, untimed, changed[..., None].shape)[..., 0], changed)


@torch.no_grad()
def test_what_comes_out_of_clap_is_in_the_order_of_its_blocks():
    """It puts the pieces side by side at its end."""
    model = tower("clap_audio")
    seen = []
    last = model.get_submodule(find_blocks(model)[-1])
    last.register_forward_hook(lambda _, args, output: seen.append(first(output)))
    output = model(**sound_inputs("clap_audio"))
    expected = model.audio_encoder.norm(seen[0])
    torch.testing.assert_close(tokens_of(model, output), expected, rtol=0, atol=1e-5)


def test_rows_of_frequencies_are_told_apart():
    """A spectrogram transformer's tokens: a change of one frame of the spectrogram, exactly."""
    model = tower("ast")
    inputs = sound_inputs("ast")
    other = inputs["input_values"].clone()
    other[0, 32] += 1.0  # patches of 8 frames, one every 4
    changed = changed_tokens(model, inputs, {"input_values": other})
    timed, untimed = TowerBatch.of("audio", model, BATCH, MEL_FRAMES).split(changed[..., None])
    assert timed.shape == (BATCH, 15, 2, 1)
    assert timed[0, :, :, 0].all(1).nonzero().flatten().tolist() == [7, 8]
    assert timed.sum() == 4
    assert untimed.shape == (BATCH, 2, 1)
    assert not untimed.any()


@pytest.mark.parametrize(
    "family",
    [
        "wav2vec2",
        "hubert",
        "wavlm",
        "unispeech_sat",
        "data2vec_audio",
        "sew",
        "moonshine",
        "parakeet",
        "wav2vec2_bert",
    ],
)
@torch.no_grad()
def test_masked_steps_are_those_that_the_tower_masks(family):
    """No token that counts as real depends on masked-out sound, in a tower that masks its own padding."""
    model = tower(family)
    ((name, sound),) = sound_inputs(family).items()
    lengths = (sound.shape[1], sound.shape[1] * 5 // 8)
    mask = torch.arange(sound.shape[1]) < torch.tensor(lengths)[:, None]
    other = sound.clone()
    other[~mask] = 3.0
    seen = []
    model.get_submodule(find_blocks(model)[-1]).register_forward_hook(
        lambda _, args, output: seen.append(first(output))
    )
    for values in (sound, other):
        model(**{name: values}, attention_mask=mask.long())
    batch = TowerBatch.of("audio", model, BATCH, sound.shape[1], mask)
    timed, untimed = batch.split(seen[0] - seen[1])
    real, _ = batch.masks(timed, untimed)
    assert real[0].all()
    assert 0.5 < real[1].float().mean() < 0.75
    # Convolutions between the tokens, and a norm over time, see what is masked.
    if family not in ("sew", "wav2vec2_bert", "moonshine"):
        assert timed[real].abs().max() < 1e-5


@pytest.mark.parametrize("family", AUDIO)
def test_a_sample_without_sound_has_no_real_step(family):
    model = tower(family)
    ((_, sound),) = sound_inputs(family).items()
    length = sound.shape[-1] if FAMILIES[family].inputs == "mels" else sound.shape[-2 if sound.ndim > 2 else 1]
    mask = torch.zeros(BATCH, length, dtype=torch.bool)
    mask[0] = True
    seen = []
    model.get_submodule(find_blocks(model)[-1]).register_forward_hook(
        lambda _, args, output: seen.append(first(output))
    )
    with torch.no_grad():
        model(**sound_inputs(family))
    batch = TowerBatch.of("audio", model, BATCH, length, mask)
    parts = batch.split(seen[0])
    for part, real in zip(parts, batch.masks(*parts), strict=True):
        assert (part is None) == (real is None)
        if real is not None:
            assert real.shape == part.shape[:2]
            assert real[0].all()
            assert not real[1].any()


def test_prefix_tokens_count_only_where_all_is_real():
    """They have seen all sound of their sample, the masked-out as well."""
    model = tower("ast")
    mask = torch.ones(BATCH, MEL_FRAMES, dtype=torch.bool)
    mask[1, 40:] = False
    batch = TowerBatch.of("audio", model, BATCH, MEL_FRAMES, mask)
    timed, untimed = batch.masks(torch.empty(BATCH, 15, 2, 1), torch.empty(BATCH, 2, 1))
    assert untimed.tolist() == [[True, True], [False, False]]
    assert timed.sum(1).tolist() == [15, 10]


@pytest.mark.parametrize("family", TEXT)
@torch.no_grad()
def test_real_words_are_those_of_the_mask(family):
    """No token of a text tower that counts as real depends on padding."""
    model = tower(family)
    inputs = tower_inputs(family)
    mask = inputs["attention_mask"].clone()
    mask[1, 5:] = 0
    other = torch.where(mask.bool(), inputs["input_ids"], 7)
    seen = []
    for name in find_blocks(model)[-1:]:
        model.get_submodule(name).register_forward_hook(lambda _, args, output: seen.append(first(output)))
    for ids in (inputs["input_ids"], other):
        model(input_ids=ids, attention_mask=mask)
    before, after = seen[len(seen) // 2 - 1], seen[-1]
    batch = TowerBatch.of("text", model, BATCH, WORDS, mask)
    timed, untimed = batch.split(before - after)
    _, real = batch.masks(timed, untimed)
    assert timed is None
    assert real[0, : WORDS // 2].all()
    assert 2 <= real[1].sum() <= 5
    assert untimed[real].abs().max() < 1e-5


def test_layouts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="doesn't fit hidden states"):
        Layout("time_major", steps=3).split(torch.zeros(2, 7, 4), 2)
    with pytest.raises(ValueError, match="doesn't fit hidden states"):
        Layout("time_major", steps=3).split(torch.zeros(8, 7, 4), 2)


@pytest.mark.parametrize("family", ["videomae", "vivit", "xclip_vision"])
def test_towers_of_a_fixed_number_of_frames_say_so(family):
    """X-CLIP would mix the frames of different videos without a word."""
    with pytest.raises(ValueError, match="num_frames=4 can't take videos of 2 frames"):
        layout_of(tower(family), "vision", 2)


def test_unknown_video_towers_are_refused():
    class Unknown(nn.Module):
        main_input_name = "pixel_values_videos"

    with pytest.raises(ValueError, match="Where time lies in the tokens of a Unknown isn't known"):
        layout_of(Unknown(), "vision", 4)


def test_masks_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(2, 4\)"):
        TowerBatch.of("vision", tower("vit"), 2, 4, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("frames", "steps", "expected"), [(4, 2, [1, 1]), (5, 2, [1, 1]), (3, 2, [1, 0]), (2, 4, [1, 1, 1, 1])]
)
def test_a_step_is_real_if_any_of_its_inputs_is(frames, steps, expected):
    mask = torch.zeros(1, frames, dtype=torch.bool)
    mask[0, :1] = True
    mask[0, 1:] = frames != 3
    assert step_mask(nn.Identity(), mask, steps).long()[0].tolist() == expected


def test_joined_words_are_real_if_all_are():
    mask = torch.tensor([[True, True, True, False]])
    assert token_mask(mask, 2).tolist() == [[True, False]]
    assert token_mask(mask, 6).tolist() == [[True, True, True, False, False, False]]
