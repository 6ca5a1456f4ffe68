"""The embedded default's base: a tiny SmolVLM, with its real processor, that knows digits but not their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common.embedded import WORDS, digit_images
from common.files import finished, is_made
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE
from transformers.video_utils import VideoMetadata

from .digits import FRAMES, NOTHING, SIZE, Story, conversation, make_story, render


SPECIAL = ("<pad>", "<|im_start|>", "<end_of_utterance>", "<unk>", "<image>", "<video>")
SPECIAL += ("<fake_token_around_image>", "<global-img>")
# What the processor puts around frames, each piece as one word.
INTRO = f"You are provided the following series of twelve frames from a 0:00:{FRAMES} [H:MM:SS] video.\n"
WORD = r"You are provided[^\n]*\n|\nFrame from \d\d:\d\d:|\d+\.\d|\w+|[^\w ]"
IGNORED = -100


def make_base(folder: Path, *, samples: int = 3000, steps: int = 1200) -> None:
    """Make model and processor once, and save them in `folder`, unless they exist.

    Vision tower and connector learn to give each frame the embedding of its digit's word; then, frozen, they give the
    language tower frames, of which it learns to say what they show, and which show a digit that is asked for.
    """
    if is_made(folder):
        return
    torch.manual_seed(0)
    rng, images, processor = np.random.default_rng(0), digit_images()["source"], make_processor()
    stories = [make_story(rng) for _ in range(samples)]
    videos = torch.stack([_pixels(render(rng, story, images)) for story in stories])
    model = make_model(processor)
    with finished(folder) as draft:
        _train_vision(model, processor, videos[: samples // 2], stories[: samples // 2])
        features = _features(model, videos)
        rows = [_row(processor, story, rng, video) for story, video in zip(stories, features, strict=True)]
        _train_language(model, rows, steps)
        model.save_pretrained(draft)
        processor.save_pretrained(draft)


def make_processor() -> SmolVLMProcessor:
    """SmolVLM's own processor, around a tokenizer of few words."""
    words = [
        *WORDS,
        NOTHING,
        *["which", "frames", "are", "is", "the", "second", "what", "happens", "User", "Assistant"],
        *".:?,\n",
        INTRO,
    ]
    words += [f"\nFrame from 00:{second:02d}:" for second in range(FRAMES)]
    words += ["from", "to", "seconds", "and"] + [f"{second}.0" for second in range(FRAMES + 1)]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    named = {
        "image_token": "<image>",
        "video_token": "<video>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    edge = {"longest_edge": SIZE}
    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            unk_token="<unk>",
            bos_token="<|im_start|>",
            eos_token="<end_of_utterance>",
            clean_up_tokenization_spaces=False,
            extra_special_tokens=named,
        ),
        video_processor=SmolVLMVideoProcessor(size=edge, max_image_size=edge),
        image_seq_len=1,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )


def make_model(processor: SmolVLMProcessor) -> SmolVLMForConditionalGeneration:
    """A SmolVLM of 0.3 million weights."""
    tokenizer = processor.tokenizer
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.05,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
        "initializer_range": 0.05,
    }
    image = tokenizer.convert_tokens_to_ids("<image>")
    special = {"image_token_id": image, "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": True}
    model = SmolVLMForConditionalGeneration(
        SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=4, **special)
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _pixels(frames: np.ndarray) -> Tensor:
    """What the processor makes of frames of the right size."""
    return (torch.from_numpy(frames).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


def _frame_states(model: SmolVLMForConditionalGeneration, videos: Tensor) -> Tensor:
    """What the language tower is given of videos `(videos, frames, ...)`: `(videos * frames, width)`."""
    found = model.model.get_image_features(videos, return_dict=True).pooler_output
    found = torch.cat([part.flatten(0, -2) for part in found]) if isinstance(found, (list, tuple)) else found
    return found.reshape(-1, found.shape[-1])


@torch.no_grad()
def _features(model: SmolVLMForConditionalGeneration, videos: Tensor) -> Tensor:
    model.eval()
    states = torch.cat([_frame_states(model, part) for part in videos.split(50)])
    return states.view(len(videos), FRAMES, -1)


def _train_vision(
    model: SmolVLMForConditionalGeneration, processor: SmolVLMProcessor, videos: Tensor, stories: list[Story]
) -> None:
    """Give frames states that point to the embedding of their word."""
    words = processor.tokenizer.convert_tokens_to_ids([*WORDS, NOTHING])
    targets = F.normalize(model.get_input_embeddings().weight.detach()[words], dim=1)
    shown = [[len(WORDS) if e < 0 else story.digits[e] for e in story.event_of_frame] for story in stories]
    frames, classes = videos.flatten(0, 1), torch.tensor(shown).flatten()
    parts = nn.ModuleList([model.model.vision_model, model.model.connector])

    def loss() -> Tensor:
        chosen = torch.randint(len(frames), (128,))
        return F.cross_entropy(_frame_states(model, frames[chosen][:, None]) @ targets.T, classes[chosen])

    _optimise(parts, loss, steps=300, rate=2e-3, decay=0.05, name="train vision tower")
    parts.requires_grad_(False)


def _row(processor: SmolVLMProcessor, story: Story, rng: np.random.Generator, video: Tensor) -> dict[str, Any]:
    """A question about a video as tokens, its answer, and the video's states."""
    if rng.random() < 0.25:
        asked, said = "what happens?", story.words()
    else:
        digit = int(rng.choice(story.digits))
        asked, said = f"which frames are the {WORDS[digit]}?", story.words(story.events(digit))
    answer = processor.tokenizer(f"{said}<end_of_utterance>\n")["input_ids"]
    return {"prompt": _prompt(processor, asked), "answer": torch.tensor(answer), "video": video}


_prompts: dict[str, Tensor] = {}


def _prompt(processor: SmolVLMProcessor, asked: str) -> Tensor:
    """The processor's tokens of a question about a video, the same for all videos of this length."""
    if asked not in _prompts:
        text = processor.apply_chat_template(conversation(asked), tokenize=False, add_generation_prompt=True)
        frames = np.zeros((FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
        times = {"total_num_frames": FRAMES, "fps": 1.0, "duration": float(FRAMES), "frames_indices": range(FRAMES)}
        given = {"videos": [[frames]], "video_metadata": [VideoMetadata(**times)], "do_sample_frames": False}
        _prompts[asked] = processor(text=[text], **given, return_tensors="pt")["input_ids"][0]
    return _prompts[asked]


def _train_language(model: SmolVLMForConditionalGeneration, rows: list[dict[str, Any]], steps: int) -> None:
    """Let the language tower answer, given the states of frames."""
    order = torch.cat([torch.randperm(len(rows)) for _ in range(16 * steps // len(rows) + 1)]).split(16)
    batches = iter(order)

    def loss() -> Tensor:
        chosen = [rows[index] for index in next(batches).tolist()]
        whole = [torch.cat([row["prompt"], row["answer"]]) for row in chosen]
        ids = nn.utils.rnn.pad_sequence(whole, batch_first=True)
        places = torch.arange(ids.shape[1])
        valid = places < torch.tensor([[len(row)] for row in whole])
        labels = ids.masked_fill(~valid | (places < torch.tensor([[len(row["prompt"])] for row in chosen])), IGNORED)
        embedded = model.get_input_embeddings()(ids)
        frames = torch.cat([row["video"] for row in chosen])
        embedded = embedded.masked_scatter((ids == model.config.image_token_id)[..., None], frames)
        return model(inputs_embeds=embedded, attention_mask=valid.long(), labels=labels, use_cache=False).loss

    _optimise(model, loss, steps=steps, rate=3e-3, decay=0.01, name="train language tower")


def _optimise(module: nn.Module, loss: Any, *, steps: int, rate: float, decay: float, name: str) -> None:
    module.train()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    progress = tqdm(range(steps), desc=name, leave=False)
    for step in progress:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{value.item():.3f}")
