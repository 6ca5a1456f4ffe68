"""Today's video language models with their real processors: trained, aligned, recomputed, cached, loaded elsewhere."""

import json

import pytest
import torch
from fresh import run_code
from helpers import EXACT, adapter_parameters, enable_checkpointing, strengthen
from peft import get_peft_model
from transformers import Trainer, TrainingArguments
from vlm.collator import VlmCollator
from vlm.data import read_samples
from vlm_models import FAMILIES, FIXED_FRAMES, base_model, needs_torchvision, processor_of, save, write_data

from peft_read import PvlaTrainer, PvlaTrainingArguments, ReadConfig


EVERY = pytest.mark.parametrize("family", [needs_torchvision(name) for name in FAMILIES])
# transformers' own.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
ARGUMENTS = {
    "max_steps": 1,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "remove_unused_columns": False,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Of videos of 3, 2 and 3 seconds, and questions of two lengths."""
    said = {"question": "what happens in the video?", "answer": "the red square moves"}
    lines = [said, said, said, said | {"question": "what happens?"}, said, said]
    return read_samples(write_data(tmp_path_factory.mktemp("vlm") / "data", lines))[1:4]


def collator_of(family):
    fixed = family in FIXED_FRAMES
    return VlmCollator(processor_of(family), fps=100 if fixed else 1, max_frames=2 if fixed else 3)


def adapted(family):
    return strengthen(get_peft_model(base_model(family), ReadConfig(r=4, cell="gru"))).eval()


def without_marks(batch):
    return {name: value for name, value in batch.items() if name != "text_token_mask"}


def of_valid(logits, batch):
    return [row[valid.bool()] for row, valid in zip(logits, batch["attention_mask"], strict=True)]


@EVERY
@torch.no_grad()
def test_a_batch_is_as_alone(family, samples):
    """As far as the base's is, whose adapter acts."""
    model, collator = adapted(family), collator_of(family)
    # SmolVLM's processor tells every video the number of frames of the longest one.
    chosen = [samples[0], samples[2 if family == "smolvlm" else 1]]
    batch, each = without_marks(collator(chosen)), [without_marks(collator([sample])) for sample in chosen]

    def distance():
        together = of_valid(model(**batch).logits, batch)
        alone = [of_valid(model(**one).logits, one)[0] for one in each]
        return max(float((a - b).abs().max()) for a, b in zip(together, alone, strict=True)), together[0]

    far, changed = distance()
    with model.disable_adapter():
        of_base, plain = distance()
    assert (changed - plain).abs().max() > 1e-3
    assert far < 3e-5 if of_base < 1e-5 else far < 20 * of_base


@EVERY
def test_checkpointing(family, samples):
    """Gradients are those without it."""
    batch = without_marks(collator_of(family)(samples[:2]))

    def gradients(model):
        model.train()(**batch, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in adapter_parameters(model).items()}

    expected, model = gradients(adapted(family)), adapted(family)
    enable_checkpointing(model)
    for name, gradient in gradients(model).items():
        scale = float(expected[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-3 * scale, msg=name)


@EVERY
@torch.no_grad()
def test_cached_generation(family, samples):
    """Of prompts padded on the left, what generation without a cache gives; and the adapter changes it."""
    model = adapted(family)
    batch = collator_of(family)([sample.without_answer() for sample in samples[:2]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(**batch, **options, use_cache=use_cache) for use_cache in (True, False))
    for a, b in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    with model.disable_adapter():
        assert (model.generate(**batch, **options).logits[-1] - cached.logits[-1]).abs().max() > 1e-3


@EVERY
def test_trainers(family, samples, tmp_path):
    """A step of each: what is logged adds up, READ's weights move, the base's don't; words and frames are counted."""
    logs = {}
    for cls, arguments in ((Trainer, TrainingArguments), (PvlaTrainer, PvlaTrainingArguments)):
        model, collator = adapted(family), collator_of(family)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        options = {}
        if cls is PvlaTrainer:
            options = {"pvla_weight": 0.5, "pvla_words": "answer", "pvla_pool_frames": True, "pvla_health_steps": 1}
        collate = collator if cls is PvlaTrainer else lambda rows: without_marks(collator_of(family)(rows))
        given = arguments(str(tmp_path), **ARGUMENTS, **options)
        trainer = cls(model, given, collate, train_dataset=samples[:2], processing_class=processor_of(family))
        trainer.train()
        logs[cls] = trainer.state.log_history[0]
        for name, value in model.state_dict().items():
            if ".read_" not in name:
                torch.testing.assert_close(value, before[name], **EXACT, msg=name)
        moved = [
            name for name in before if ".read_" in name and not torch.equal(before[name], model.state_dict()[name])
        ]
        assert len(moved) == len(adapter_parameters(model))
    log, batch = logs[PvlaTrainer], collator_of(family)(samples[:2])
    assert log["task_loss"] == pytest.approx(logs[Trainer]["loss"], abs=1e-4)
    assert log["loss"] == pytest.approx(log["task_loss"] + 0.5 * log["pvla_loss"], abs=1e-4)
    words = (batch["text_token_mask"].bool() & (batch["labels"] != -100)).sum(1)
    assert log["pvla_words"] == pytest.approx(float(words.float().mean()))
    assert 1 <= log["pvla_frames"] <= 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory, samples):
    """Folders of models and adapters, and what each says about a video."""
    folder, said = tmp_path_factory.mktemp("saved"), {}
    for param in EVERY.args[1]:
        if param.marks[0].args[0]:
            continue
        family = param.values[0]
        save(family, folder / family)
        model = adapted(family)
        model.save_pretrained(folder / family / "adapter")
        batch = collator_of(family)([samples[0].without_answer()])
        torch.save(batch, folder / family / "batch.pt")
        said[family] = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False).tolist()
    return folder, said


LOAD = """
import json, sys
from pathlib import Path
import common  # torchvision, where it is
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
import peft_read

said = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), folder / "adapter").eval()
    batch = torch.load(folder / "batch.pt")
    said[folder.name] = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False).tolist()
Path(sys.argv[2]).write_text(json.dumps(said))
"""


@pytest.mark.filterwarnings("default")
def test_adapters_say_the_same_in_a_new_process(saved, tmp_path):
    folder, said = saved
    if not said:
        pytest.skip("no family's processor can be had")
    run_code(LOAD, folder, tmp_path / "said.json")
    assert json.loads((tmp_path / "said.json").read_text()) == said
