"""Models whose video tokens are aligned with words before the blocks: an own one, VLMs, trained embeddings."""

import torch
from alignment import Case
from alignment_batches import filmed, joined, pictured, random, spoken, words
from alignment_models import VIDEO, VISUAL, build, llava, qwen2_vl
from models import WIDTH, bert_config, llama_config
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM
from video_grounding.features import Collator
from video_grounding.modeling import GroundingConfig, GroundingModel

from peft_read import ReadConfig


FEATURES = 6


class Tokens:
    """What the example's collator asks of a tokenizer."""

    pad_token_id, sep_token_id = 0, 2


def grounding(trained=("frame_projection", "saliency_head")):
    return build(
        GroundingModel,
        GroundingConfig(bert_config(), feature_size=FEATURES, sep_token_id=2),
        modules_to_save=list(trained),
    )


def watched(rows=8, labels=True):
    """Queries of several lengths about videos of several lengths."""
    data = []
    for row in range(rows):
        query = words(row, 2 + row % 3).tolist()
        example = {"input_ids": [1, *query, 2], "word_mask": [0] + [1] * len(query) + [0]}
        frames = 3 + row % 4
        example["frame_features"] = random(frames, FEATURES, seed=row)
        data.append(example | ({"labels": (torch.arange(frames) % 2).float()} if labels else {}))
    return data


def of_grounding(model, batch, outputs, heard):
    base = model.get_base_model()
    projected = base.frame_projection(batch["frame_features"])
    embedded = base.text_model.get_input_embeddings()(batch["input_ids"]).detach()
    mask = batch["text_token_mask"][:, : embedded.shape[1]]
    return [(p[f], e[w]) for p, f, e, w in zip(projected, batch["frame_mask"], embedded, mask, strict=True)]


def of_projector(name, token, tokens):
    """A projector's output against the frozen embeddings of all other valid tokens."""

    def compared(model, batch, outputs, heard):
        ids, valid = batch["input_ids"], batch["attention_mask"].bool()
        embedded = model.get_base_model().get_input_embeddings()(ids).detach()
        video = heard[name].reshape(len(ids), tokens, WIDTH)
        return [(v, e[m & (i != token)]) for v, e, m, i in zip(video, embedded, valid, ids, strict=True)]

    return compared


def of_trained_embeddings(model, batch, outputs, heard):
    embedded, valid = model.get_base_model().get_input_embeddings()(batch["input_ids"]), batch["attention_mask"].bool()
    pairs = []
    for row, states in enumerate(embedded):
        video, text = (states[valid[row] & batch[f"{kind}_token_mask"][row].bool()] for kind in ("video", "text"))
        if len(video) and len(text):
            pairs.append((video, text))
    return pairs


def mean_over_frames(outputs, labels, num_items_in_batch):
    """The own model's loss as a part of the mean over all frames of the step, not of a batch's own."""
    valid = labels != -100
    logits = outputs.logits[valid]
    return nn.functional.binary_cross_entropy_with_logits(logits, labels[valid], reduction="sum") / num_items_in_batch


def with_saved(model, names):
    """The adapted model anew, with more that is trained."""
    return get_peft_model(model().unload(), ReadConfig(r=4, modules_to_save=names))


INPUTS = {"pvla_states": "inputs"}
PROJECTOR = "base_model.model.model.multi_modal_projector"
MERGER = "base_model.model.model.visual.merger"
MODELS = {
    "own model": Case(grounding, watched, of_grounding, collator=Collator(Tokens()), options=INPUTS),
    "llava": Case(
        lambda: with_saved(llava, ["multi_modal_projector"]),
        pictured,
        of_projector(PROJECTOR, VISUAL, 4),
        (PROJECTOR,),
        options=INPUTS,
    ),
    "qwen2-vl": Case(
        lambda: with_saved(qwen2_vl, ["visual.merger"]),
        filmed,
        of_projector(MERGER, VIDEO, 2),
        (MERGER,),
        collator=joined,
        options=INPUTS,
    ),
    "trained embeddings": Case(
        lambda: build(LlamaForCausalLM, llama_config(tie_word_embeddings=False), modules_to_save=["embed_tokens"]),
        spoken,
        of_trained_embeddings,
        options=INPUTS,
    ),
}
