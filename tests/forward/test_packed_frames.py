"""Recurrence over frames in packed vision towers: the patches of all videos and images lie in one axis there."""

import pytest
import torch
import transformers
from helpers import CLOSE, adapter_parameters, enable_checkpointing, strengthen
from packed_towers import (
    IMAGES,
    MERGE,
    MODELS,
    TOKENS,
    VIDEOS,
    base_model,
    features_of,
    patches,
    pictures,
    tower_of,
)
from peft import get_peft_model
from torch import nn
from transformers.vision_utils import get_vision_window_index

from peft_read import ReadConfig, describe_tokens, find_feed_forward_outputs
from peft_read.forward.frames import frame_rows
from peft_read.read.layer import ReadLayer


FAMILY = pytest.mark.parametrize("family", MODELS)


def blocks_of(model):
    """Names of the feed-forward outputs of the packed tower."""
    tower = tower_of(model)
    prefix = next(name for name, module in model.named_modules() if module is tower)
    return [name for name in find_feed_forward_outputs(model) if name.startswith(prefix)]


def adapted(family, **options):
    model = base_model(family)
    config = ReadConfig(
        **{"r": 4, "cell": "gru", "recur_over": "frames", "target_modules": blocks_of(model)} | options
    )
    return strengthen(get_peft_model(model, config)).eval()


def test_rows_by_frame():
    """Of two videos and an image: every place of a video in each of its frames, wherever the others lie."""
    groups, back = frame_rows([(2, 1, 3), (1, 2, 2), (2, 1, 1)])
    assert groups[0].tolist() == [[0, 3], [1, 4], [2, 5], [10, 11]]
    assert groups[1].tolist() == [[6], [7], [8], [9]]
    assert torch.cat([group.flatten() for group in groups])[back].tolist() == list(range(12))
    merged, _ = frame_rows([(2, 2, 4)], merged=4)
    assert merged[0].tolist() == [[0, 2], [1, 3]]


@FAMILY
@pytest.mark.parametrize("bidirectional", [False, True])
@torch.no_grad()
def test_each_video_and_image_is_as_alone(family, bidirectional):
    """Whatever else is in the batch, of other sizes or the same; and the adapter acts."""
    model = adapted(family, bidirectional=bidirectional)
    for kind, grid in (("video", VIDEOS), ("image", IMAGES)):
        parts = patches(family, grid)
        together = features_of(model, family, kind, parts, grid)
        for found, part, size in zip(together, parts, grid, strict=True):
            torch.testing.assert_close(found, features_of(model, family, kind, [part], [size])[0], **CLOSE)
        with model.disable_adapter():
            assert (features_of(model, family, kind, parts, grid)[0] - together[0]).abs().max() > 1e-2


def natural_order(model, family, grid):
    """Row numbers `(frames, rows, columns)` of each video's patches in a block of the tower."""
    tower, size = tower_of(model), grid.prod(-1).tolist()
    order = torch.arange(sum(size))
    if hasattr(tower, "window_size"):  # merged patches come by windows: `order[i]` lies in row i
        windows, _ = get_vision_window_index(grid, MERGE, tower.window_size, tower.patch_size)
        order = order.view(-1, MERGE**2)[windows].flatten()
    row = torch.empty_like(order)
    row[order] = torch.arange(len(order))
    # Patches come by blocks of those that are merged.
    shapes = [(t, h // MERGE, w // MERGE, MERGE, MERGE) for t, h, w in grid.tolist()]
    parts = zip(row.split(size), shapes, grid.tolist(), strict=True)
    return [part.view(shape).transpose(2, 3).reshape(whole) for part, shape, whole in parts]


@FAMILY
@pytest.mark.parametrize("cell", ["rnn", "lstm"])
@torch.no_grad()
def test_by_hand(family, cell):
    """Each patch's state runs over the same place of its own video: a loop over videos, rows and columns."""
    model = adapted(family, cell=cell)
    layer = next(module for module in model.modules() if isinstance(module, ReadLayer))
    seen = {}
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.update(base=output.flatten(0, -2)))
    layer.register_forward_hook(lambda module, args, output: seen.update(adapted=output.flatten(0, -2)))
    features_of(model, family, "video", patches(family, VIDEOS), VIDEOS)
    expected = seen["base"].clone()
    for rows in natural_order(model, family, torch.tensor(VIDEOS)):
        for place in rows.flatten(1).T:
            steps = layer.read_downward["default"](seen["base"][place])[None]
            states = layer.read_recurrence["default"](steps)[0]
            expected[place] += layer.read_upward["default"](nn.functional.gelu(states))
    torch.testing.assert_close(seen["adapted"], expected, **CLOSE)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_merged_patches(family):
    """Behind the tower's blocks a row stands for several patches."""
    model = adapted(family, target_modules=r".*visual\.merger\..*(mlp\.2|linear_fc2)")
    parts = patches(family, VIDEOS)
    together = features_of(model, family, "video", parts, VIDEOS)
    for found, part, size in zip(together, parts, VIDEOS, strict=True):
        torch.testing.assert_close(found, features_of(model, family, "video", [part], [size])[0], **CLOSE)
    # The first frame doesn't see the second, of which it is the other way round.
    changed = parts[0].clone()
    changed[32:] += 1
    last = features_of(model, family, "video", [changed], VIDEOS[:1])[0]
    torch.testing.assert_close(together[0][:8], last[:8], **CLOSE)
    changed = parts[0].clone()
    changed[:16] += 1
    first = features_of(model, family, "video", [changed], VIDEOS[:1])[0]
    with model.disable_adapter():
        of_base = [features_of(model, family, "video", [given], VIDEOS[:1])[0] for given in (parts[0], changed)]
    torch.testing.assert_close(of_base[0][8:], of_base[1][8:], **CLOSE)
    assert (first[8:] - together[0][8:]).abs().max() > 1e-2


def whole_batch(family, which=(0, 1)):
    """A forward of a whole model: a sample for each of some videos, with an image of its size where that goes."""
    image, video = TOKENS["image_token_id"], TOKENS["video_token_id"]
    videos = [VIDEOS[i] for i in which]
    rows, kinds = [], []
    for t, h, w in videos:
        merged = h * w // MERGE**2
        if family.startswith("glm"):  # takes no images beside videos, whose frames are images in its text
            frames = [6, *[image] * merged] * t
            row = [5, TOKENS["video_start_token_id"], *frames, TOKENS["video_end_token_id"], 7, 8, 9]
            kinds.append(torch.tensor([2 if token == image else 0 for token in row]))
        else:
            frames = [6, *[video] * merged] * t if "qwen3" in family else [6, *[video] * merged * t]
            row = [5, *[image] * merged, *frames, 7, 8, 9]
            kinds.append(torch.tensor([{image: 1, video: 2}.get(token, 0) for token in row]))
        rows.append(torch.tensor(row))
    ids, kinds = (nn.utils.rnn.pad_sequence(given, batch_first=True) for given in (rows, kinds))
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    batch["labels"] = ids.masked_fill((ids > 9) | (ids == 0), -100)
    if "omni" not in family:
        batch["mm_token_type_ids"] = kinds
    batch |= pictures(family, "video", [patches(family, VIDEOS)[i] for i in which], videos)
    if not family.startswith("glm"):
        sizes = [(1, *size[1:]) for size in VIDEOS]
        images = patches(family, sizes, seed=1)
        batch |= pictures(family, "image", [images[i] for i in which], [sizes[i] for i in which])
    return batch


@FAMILY
@torch.no_grad()
def test_whole_models(family):
    """Images and videos of several samples in one forward, of the same sizes: each sample as alone."""
    model = adapted(family)
    together = model(**whole_batch(family)).logits
    with model.disable_adapter():
        assert (model(**whole_batch(family)).logits - together).abs().max() > 1e-3
    for i in range(2):
        alone = model(**whole_batch(family, [i])).logits[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=0, atol=5e-5)


def gradients(model, run):
    model.train().zero_grad()
    run(model).backward()
    return {name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()}


@pytest.mark.parametrize(
    ("family", "through", "use_reentrant"),
    [
        ("qwen2_5_vl", "the model", True),
        ("qwen2_5_vl", "the model", False),
        ("glm4v", "the model", False),
        ("qwen3_vl", "its tower", True),
        ("qwen3_vl", "its tower", False),
    ],
)
def test_checkpointing(family, through, use_reentrant):
    """Blocks are computed again after the models around them have ended: the gradients are those without that."""

    def run(model):
        if through == "the model":
            return model(**whole_batch(family)).loss
        tower, parts = tower_of(model), torch.cat(patches(family, VIDEOS)).requires_grad_()
        return tower(parts, grid_thw=torch.tensor(VIDEOS)).last_hidden_state.square().mean()

    expected = gradients(adapted(family), run)
    model = adapted(family)
    enable_checkpointing(model, use_reentrant)
    for name, gradient in gradients(model, run).items():
        scale = float(expected[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-4 * scale)


@torch.no_grad()
def test_compiled():
    """The same, in a compiled tower."""
    tower = tower_of(adapted("qwen2_vl"))
    given, grid = torch.cat(patches("qwen2_vl", VIDEOS)), torch.tensor(VIDEOS)
    expected = tower(given, grid_thw=grid).last_hidden_state
    torch._dynamo.reset()
    compiled = torch.compile(tower, backend="eager")
    torch.testing.assert_close(compiled(given, grid_thw=grid).last_hidden_state, expected, **CLOSE)


def test_other_recurrences_are_refused():
    """Before anything is adapted, with the way that works."""
    model = base_model("qwen2_vl")
    for target in (blocks_of(model), "all-linear"):
        with pytest.raises(ValueError, match=r"visual\..* all samples lie in one axis.*Set `recur_over='frames'`"):
            get_peft_model(model, ReadConfig(target_modules=target))
    assert not any(isinstance(module, ReadLayer) for module in model.modules())
    with pytest.raises(ValueError, match=r"`num_frames=3` isn't for model\.visual\.blocks\.0.*Leave it out"):
        get_peft_model(model, ReadConfig(recur_over="frames", num_frames=3, target_modules=blocks_of(model)))
    plain = get_peft_model(model, ReadConfig(cell="none", target_modules=blocks_of(model)))
    features_of(plain, "qwen2_vl", "video", patches("qwen2_vl", VIDEOS), VIDEOS)


@pytest.mark.parametrize("options", [{}, {"recur_over": "frames"}], ids=["sequence", "frames"])
def test_packed_sound_is_refused(options):
    """Rows of all samples in one axis, and nothing that says which is which to an adapter."""
    model = base_model("qwen2_5_omni_thinker")
    with pytest.raises(ValueError, match=r"audio_tower\.layers\.0.*one axis.*Leave the tower out"):
        get_peft_model(model, ReadConfig(target_modules=r".*audio_tower.*fc2", **options))


def test_towers_that_are_not_told_frames_need_their_number():
    """At injection, with the towers that don't."""
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(ValueError, match=r"needs `num_frames`, .*mlp\.fc2.*only towers that take `grid_thw`"):
        get_peft_model(transformers.ViTModel(config), ReadConfig(recur_over="frames"))


@torch.no_grad()
def test_what_is_not_about_the_rows_is_refused():
    """Another number of rows than the grid tells; a tower without a grid; several adapters in one batch."""
    model = adapted("qwen2_vl")
    layer = next(module for module in model.modules() if isinstance(module, ReadLayer))
    handle = layer.base_layer.register_forward_hook(lambda module, args, output: output[:-2])
    with pytest.raises(ValueError, match=r"has 130 rows where `grid_thw` tells of 132 patches"):
        features_of(model, "qwen2_vl", "video", patches("qwen2_vl", VIDEOS), VIDEOS)
    handle.remove()
    with pytest.raises(RuntimeError, match="outside of a call of its tower"):
        layer(torch.zeros(4, layer.in_features))
    with pytest.raises(RuntimeError, match="outside of a call of its tower"), describe_tokens():
        layer(torch.zeros(4, layer.in_features))


@torch.no_grad()
def test_adapters_by_sample():
    """One for all samples is right; several can't be, as nothing says whose a patch is."""
    model, batch = adapted("qwen2_vl"), whole_batch("qwen2_vl")
    expected = model(**batch).logits
    torch.testing.assert_close(model(**batch, adapter_names=["default", "default"]).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match=r"visual\.blocks\.0.*each sample an adapter of its own.*by themselves"):
        model(**batch, adapter_names=["default", "__base__"])
    model.add_adapter("text", ReadConfig(r=4))
    strengthen(model, adapter_name="text")
    mixed = model(**batch, adapter_names=["text", "__base__"]).logits  # neither is in the tower
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(**batch).logits[1], **CLOSE)
