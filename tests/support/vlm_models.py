"""Tiny random video language models with their real processors, and data folders of real video files for them."""

import functools
import importlib.util
import json

import av
import numpy as np
import pytest
import torch
import transformers
from common.beside_torch import import_torchvision
from conformance.shrink import shrink
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


HAS_TORCHVISION = import_torchvision()
SIZE, PATCH = 32, 8
SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<end_of_utterance>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
    "<video>",
    "<fake_token_around_image>",
    "<global-img>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<|image|>",
    "<|video|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<image_soft_token>",
    "<start_of_image>",
    "<end_of_image>",
]
IDS = {token: number for number, token in enumerate(SPECIAL)}
TEXT = (
    "the moment when the red square moves from 3.0 to 7.5 seconds",
    "what happens in the video? user assistant system: Frame from 00:01: At which seconds does it show this:",
    "You are provided the following series of eight frames from a 0:00:08 [H:MM:SS] video.",
)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'video' %}VIDEO{% elif c['type'] == 'image' %}IMAGE{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MROPE = {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
PIXELS = {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE * 64}
SQUARE = {"height": SIZE, "width": SIZE}


@functools.cache
def _trained_tokenizer():
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(TEXT * 20, trainers.BpeTrainer(vocab_size=420, **options))
    return tokenizer.to_str()


def tokenizer(**named):
    """A byte-level tokenizer; `named` are the special tokens that a family's processor asks for by name."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        extra_special_tokens=named,
    )


def chat(video, image="<image>"):
    return CHAT.replace("VIDEO", video).replace("IMAGE", image)


def made(name, *args, **options):
    return getattr(transformers, name)(*args, **options)


def qwen(processor, video_processor="Qwen2VLVideoProcessor"):
    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    start, end = named["vision_start_token"], named["vision_end_token"]
    template = chat(f"{start}<|video_pad|>{end}", f"{start}<|image_pad|>{end}")
    return made(
        processor,
        image_processor=made("Qwen2VLImageProcessor", patch_size=PATCH, size=PIXELS),
        tokenizer=tokenizer(**named),
        video_processor=made(video_processor, patch_size=PATCH, size=PIXELS),
        chat_template=template,
    )


def smolvlm():
    named = {
        "image_token": "<image>",
        "video_token": "<video>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    edge = {"longest_edge": SIZE}
    return made(
        "SmolVLMProcessor",
        image_processor=made("SmolVLMImageProcessor", size=edge, max_image_size=edge, do_image_splitting=False),
        tokenizer=tokenizer(**named),
        video_processor=made("SmolVLMVideoProcessor", size=edge, max_image_size=edge),
        image_seq_len=4,
        chat_template=chat("<video>"),
    )


def internvl():
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return made(
        "InternVLProcessor",
        image_processor=made("GotOcr2ImageProcessor", size=SQUARE),
        tokenizer=tokenizer(**named),
        video_processor=made("InternVLVideoProcessor", size=SQUARE),
        image_seq_length=4,
        chat_template=chat("<video>", "<IMG_CONTEXT>"),
    )


def video_llama_3():
    return made(
        "VideoLlama3Processor",
        image_processor=made("VideoLlama3ImageProcessor", patch_size=PATCH, size=PIXELS),
        tokenizer=tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>"),
        video_processor=made("VideoLlama3VideoProcessor", patch_size=PATCH, size=PIXELS),
        chat_template=chat("<|video_pad|>", "<|image_pad|>"),
    )


def glm4v():
    video = "<|begin_of_video|><|video|><|end_of_video|>"
    return made(
        "Glm4vProcessor",
        image_processor=made("Glm4vImageProcessor", patch_size=PATCH, size=PIXELS),
        tokenizer=tokenizer(image_token="<|image|>", video_token="<|video|>"),
        video_processor=made("Glm4vVideoProcessor", patch_size=PATCH, size=PIXELS),
        chat_template=chat(video, "<|begin_of_image|><|image|><|end_of_image|>"),
    )


def llava_next_video():
    return made(
        "LlavaNextVideoProcessor",
        video_processor=made("LlavaNextVideoVideoProcessor", size=SQUARE, crop_size=SQUARE),
        image_processor=made("LlavaNextImageProcessor", size={"shortest_edge": SIZE}),
        tokenizer=tokenizer(image_token="<image>", video_token="<video>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat("<video>"),
    )


def llava_onevision():
    return made(
        "LlavaOnevisionProcessor",
        image_processor=made("LlavaOnevisionImageProcessor", size=SQUARE),
        tokenizer=tokenizer(image_token="<image>", video_token="<video>"),
        video_processor=made("LlavaOnevisionVideoProcessor", size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chat("<video>"),
    )


def gemma3():
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    return made(
        "Gemma3Processor",
        image_processor=made("Gemma3ImageProcessorPil", size=SQUARE),
        tokenizer=tokenizer(**named),
        image_seq_length=4,
        chat_template=chat("", "<start_of_image>"),
    )


def idefics3():
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    edge = {"longest_edge": SIZE}
    return made(
        "Idefics3Processor",
        image_processor=made("Idefics3ImageProcessorPil", size=edge, max_image_size=edge, do_image_splitting=False),
        tokenizer=tokenizer(**named),
        image_seq_len=4,
        chat_template=chat("", "<image>"),
    )


QWEN_IDS = {
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
}
QWEN = MROPE | QWEN_IDS | {"vision_config.temporal_patch_size": 2, "vision_config.spatial_merge_size": 2}
PLACES = {"vision_config.num_position_embeddings": 64}
WINDOWS = {"vision_config.fullatt_block_indexes": [1], "vision_config.window_size": 16}
LLAVA_IDS = {f"{kind}_token_{end}": IDS[f"<{kind}>"] for kind in ("image", "video") for end in ("id", "index")}
GLM_IDS = {f"{kind}_token_id": IDS[f"<|{kind}|>"] for kind in ("image", "video")} | {
    f"{kind}_{side}_token_id": IDS[f"<|{name}_of_{kind}|>"]
    for kind in ("image", "video")
    for side, name in (("start", "begin"), ("end", "end"))
}
GEMMA_IDS = {
    "image_token_id": IDS["<image_soft_token>"],
    "image_token_index": IDS["<image_soft_token>"],
    "boi_token_index": IDS["<start_of_image>"],
    "eoi_token_index": IDS["<end_of_image>"],
    "mm_tokens_per_image": 4,
}
# By model type: the class of the model, what makes its processor, and what its tiny configuration needs besides.
FAMILIES = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", lambda: qwen("Qwen2VLProcessor"), QWEN),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        lambda: qwen("Qwen2_5_VLProcessor"),
        QWEN | WINDOWS,
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        lambda: qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
        QWEN | PLACES | {"vision_config.deepstack_visual_indexes": [0, 1]},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        lambda: qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
        QWEN | PLACES | {"vision_config.deepstack_visual_indexes": [0]},
    ),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        lambda: qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
        QWEN | PLACES,
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration",
        smolvlm,
        {"image_token_id": IDS["<image>"], "scale_factor": 2},
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        internvl,
        {"image_token_id": IDS["<IMG_CONTEXT>"], "downsample_ratio": 0.5}
        | {"vision_config.patch_size": [PATCH, PATCH], "vision_config.image_size": [SIZE, SIZE]},
    ),
    "video_llama_3": ("VideoLlama3ForConditionalGeneration", video_llama_3, QWEN_IDS),
    "glm4v": ("Glm4vForConditionalGeneration", glm4v, MROPE | GLM_IDS),
    "llava_next_video": (
        "LlavaNextVideoForConditionalGeneration",
        llava_next_video,
        LLAVA_IDS | {"spatial_pool_stride": 2},
    ),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration", llava_onevision, LLAVA_IDS),
    "gemma3": ("Gemma3ForConditionalGeneration", gemma3, GEMMA_IDS),
    "idefics3": ("Idefics3ForConditionalGeneration", idefics3, {"image_token_id": IDS["<image>"], "scale_factor": 2}),
}
# Without torchvision: those whose processors take images by PIL and have no part for videos.
WITHOUT_TORCHVISION = {"gemma3", "idefics3"} if Version(transformers.__version__) >= Version("5.20") else {"gemma3"}
# Whose processors can't batch videos of different numbers of frames.
FIXED_FRAMES = {"internvl", "llava_next_video", "llava_onevision"}


def needs_torchvision(family):
    """A family as a parameter of a test that is skipped where its processor can't be had."""
    reasons = []
    if not HAS_TORCHVISION and family not in WITHOUT_TORCHVISION:
        reasons.append("torchvision isn't installed, which this family's processor needs")
    if family == "smolvlm" and importlib.util.find_spec("num2words") is None:
        reasons.append("num2words isn't installed, which this family's processor needs")
    return pytest.param(family, marks=pytest.mark.skipif(bool(reasons), reason="; ".join(reasons) or "none"))


@functools.cache
def processor_of(family):
    return FAMILIES[family][1]()


@functools.cache
def _config(family):
    name, _, changes = FAMILIES[family]
    sizes = {"vision_config.patch_size": PATCH, "vision_config.image_size": SIZE, "text_config.vocab_size": 480}
    room = {"text_config.max_position_embeddings": 512}
    return shrink(getattr(transformers, name).config_class(), sizes | room | changes)


def base_model(family):
    """The family's tiny model, frozen, always with the same weights."""
    torch.manual_seed(0)
    model = getattr(transformers, FAMILIES[family][0])(_config(family)).eval().requires_grad_(False)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": IDS["<|im_end|>"]}
    for name, number in special.items():
        setattr(model.generation_config, name, number)
    return model


def save(family, folder):
    """Model and processor in a folder, as a user has them."""
    base_model(family).save_pretrained(folder)
    processor_of(family).save_pretrained(folder)
    return folder


def write_video(path, seconds, rate=4, seed=0):
    """A square that moves over a plain ground."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height = stream.width = SIZE
        stream.pix_fmt = "yuv420p"
        for index in range(round(seconds * rate)):
            frame = np.full((SIZE, SIZE, 3), 40 * (seed % 3), dtype=np.uint8)
            column = (3 * index + seed) % (SIZE - 8)
            frame[8:16, column : column + 8] = rng.integers(100, 255, 3)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_data(folder, lines=None, *, kind="question"):
    """A data folder: videos of 2 and 3 seconds, and a line for each, of one kind or as given."""
    folder.mkdir(parents=True)
    splits = ("train", "train", "train", "validation", "test", "test")
    of_kind = {
        "question": {"question": "what happens in the video?", "answer": "the red square moves"},
        "query": {"query": "the red square moves", "relevant_windows": [[0.5, 1.5]]},
        "caption": {"caption": "the red square moves"},
    }
    lines = lines or [of_kind[kind] for _ in splits]
    with (folder / "annotations.jsonl").open("w", encoding="utf-8") as file:
        for number, (split, line) in enumerate(zip(splits, lines, strict=True)):
            write_video(folder / f"{number}.mp4", seconds=2 + number % 2, seed=number)
            file.write(json.dumps({"video": f"{number}.mp4", "split": split, **line}) + "\n")
    return folder
