"""The documentation's pages and their Python blocks, and tiny stand-ins for the models and files that they name."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import strengthen
from media_files import SIDE, tokenizer, write_video
from models import bert_config, classifier
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    BertModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from video_grounding.modeling import GroundingConfig, GroundingModel

import peft_read


ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ("hub_cards/lstta.md", "hub_cards/read.md")  # of pages, and none themselves
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def pages():
    """All of the documentation, by its path in the repository."""
    folders = ("", ".github", "examples", "hub_cards", "tests")
    found = {path for folder in folders for path in (ROOT / folder).glob("**/*.md" if folder else "*.md")}
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


@dataclass(frozen=True)
class Block:
    """A Python block, and the heading that it stands under."""

    code: str
    heading: str

    def names(self):
        """What it reads before it sets it."""
        needed, known = set(), set()
        for statement in ast.parse(self.code).body:
            nodes = list(ast.walk(statement))
            variables = [node for node in nodes if isinstance(node, ast.Name)]
            needed |= {variable.id for variable in variables if isinstance(variable.ctx, ast.Load)} - known
            known |= {variable.id for variable in variables if isinstance(variable.ctx, ast.Store)}
            imports = [
                alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
            ]
            known |= {(alias.asname or alias.name).partition(".")[0] for alias in imports}
        return needed


def blocks(page):
    """The Python blocks of a page, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    headings = [(match.start(), match[1]) for match in HEADING.finditer(text)]
    return [
        Block(match[1], [heading for start, heading in headings if start < match.start()][-1])
        for match in BLOCK.finditer(text)
    ]


def adapted(**options):
    """A tiny classifier with READ."""
    config = peft_read.ReadConfig(**{"r": 4, "modules_to_save": ["classifier"]} | options)
    return strengthen(get_peft_model(classifier(), config)).eval()


def rows():
    """Samples of which half of the tokens are video."""
    masks = {"video_token_mask": [1] * 4 + [0] * 4, "text_token_mask": [0] * 4 + [1] * 4}
    return [
        {"input_ids": list(range(i, i + 8)), "attention_mask": [1] * 8, "labels": i % 3} | masks for i in range(3, 7)
    ]


class TwoParts(nn.Module):
    """Features of a video and of text, each with a part of its own."""

    def __init__(self):
        super().__init__()
        self.video_encoder, self.text_encoder = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, video, text):
        return self.video_encoder(video).mean(1) + self.text_encoder(text).mean(1)


def two_parts():
    config = peft_read.ReadConfig(r=4, target_modules=["video_encoder", "text_encoder"])
    return strengthen(get_peft_model(TwoParts(), config)).eval()


def mask(*lengths):
    return torch.arange(6) < torch.tensor(lengths)[:, None]


# What a block finds in its scope: by the page, or the page and the heading, made anew for each block that reads it.
STAND_INS = {
    "README.md#peft-read": {"model": classifier},
    "README.md#READ": {"model": classifier},
    "README.md#PVLA": {"model": adapted, "train_dataset": rows},
    "README.md#Share": {"base_model": classifier},
    "examples/inputs.md": {
        "model": two_parts,
        "video": lambda: torch.randn(2, 6, 8),
        "text": lambda: torch.randn(2, 6, 8),
        "video_mask": lambda: mask(6, 3),
        "text_mask": lambda: mask(2, 6),
        "ids": lambda: torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]]),
    },
    "examples/inputs.md#Compile and export": {"model": adapted, "tokenizer": lambda: words},
    "hub_cards/README.md": {"model": adapted, "base_model": classifier},
}
# And everywhere but on the front page, which imports them.
IMPORTED = {"peft_read": peft_read, "torch": torch, "get_peft_model": get_peft_model, "PeftModel": PeftModel}


def words(texts, **options):
    """A tokenizer's output, with ids that a tiny BERT has."""
    return tokenizer()(texts, return_token_type_ids=False, **options)


def run(page):
    """Run a page's blocks one after another, in the scope that a reader would have; pushes run in `hub_client.py`."""
    scope = {"__name__": "page"} | ({} if page == "README.md" else IMPORTED | {"huggingface_hub": huggingface_hub})
    for block in blocks(page):
        if "push_to_hub(" in block.code:
            assert (page, block.heading) == ("README.md", "Share"), "hub_client.py runs the front page's pushes alone"
            continue
        if "onnx_translations()" in block.code:
            pytest.importorskip("onnxscript")
        made = STAND_INS.get(page, {}) | STAND_INS.get(f"{page}#{block.heading}", {})
        scope |= {name: made[name]() for name in block.names() & made.keys()}
        exec(compile(block.code, f"{page}, {block.heading}", "exec"), scope)


def siglip(folder):
    text = SiglipTextConfig(**SMALL, vocab_size=50, max_position_embeddings=16)
    vision = SiglipVisionConfig(**SMALL, image_size=SIDE, patch_size=16)
    SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def spectrograms(folder):
    ASTModel(ASTConfig(**SMALL, max_length=128, num_mel_bins=16)).save_pretrained(folder)
    ASTFeatureExtractor(max_length=128, num_mel_bins=16).save_pretrained(folder)


def bert(folder):
    BertModel(bert_config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def t5(folder):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def two_adapters(folder):
    model = adapted()
    model.add_adapter("other", peft_read.ReadConfig(r=2, modules_to_save=["classifier"]))
    model.save_pretrained(folder)


HUB = {
    "google/siglip-base-patch16-224": siglip,
    "MIT/ast-finetuned-audioset-10-10-0.4593": spectrograms,
    "google-bert/bert-base-uncased": bert,
    "google-t5/t5-small": t5,
    "your-name/your-adapter": two_adapters,
}


def fill_cache(cache):
    """Put the stand-ins where huggingface_hub has what it once downloaded: a hub id then loads without a network."""
    for name, save in HUB.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        torch.manual_seed(0)
        save(repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)


def fill_folder(folder):
    """What the pages load by a path: videos with sound, and the towers, bases and adapters of the example cards."""
    for name in ("a.mp4", "b.mp4"):
        write_video(folder / name)


def base_of_read_card(folder):
    """`examples/finetune_video.py`'s card loads a base and its adapter."""
    model = GroundingModel(GroundingConfig(bert_config(), feature_size=4, sep_token_id=3))
    model.save_pretrained(folder / "path" / "to" / "base-model")
    get_peft_model(model, peft_read.ReadConfig(r=4)).save_pretrained(folder / "adapter")


def towers_of_lstta_card(folder):
    """`examples/trimodal_question_answering.py`'s card loads three towers and an adapter."""
    towers = {name: str(folder / "path" / "to" / f"{name}-tower") for name in ("vision", "audio", "text")}
    for name, save in (("vision", siglip), ("audio", spectrograms), ("text", bert)):
        save(Path(towers[name]))
    model = peft_read.TrimodalForFrameClassification.from_pretrained_towers(**towers, num_labels=11, projection_dim=64)
    config = peft_read.LsttaConfig(r=8, num_heads=2, modules_to_save=["classifier", "fusion"])
    get_peft_model(model, config).save_pretrained(folder / "adapter")


FILES = {
    "hub_cards/examples/finetune_video.md": base_of_read_card,
    "hub_cards/examples/trimodal_question_answering.md": towers_of_lstta_card,
}
