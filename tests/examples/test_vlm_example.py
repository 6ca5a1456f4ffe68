"""The example for video language models: its batches, whole runs on folders of tiny models, and its own default."""

import json
import logging
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from helpers import strengthen
from peft import PeftModel, get_peft_model
from vlm_models import FAMILIES, FIXED_FRAMES, base_model, needs_torchvision, processor_of, save, write_data

import peft_read


pytest.importorskip("rouge_score")

import finetune_vlm
from vlm import digits
from vlm.collator import VlmCollator
from vlm.data import read_samples
from vlm.metrics import score
from vlm.modeling import load_adapter, load_model
from vlm.survey import survey


pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:Glyph:UserWarning"
)
EVERY = pytest.mark.parametrize("family", [needs_torchvision(name) for name in FAMILIES])
RUN = "--max_steps 2 --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --max_new_tokens 5 --use_cpu True"
RUN += " --disable_tqdm True --learning_rate 1e-2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of all kinds of lines."""
    said = {"question": "what happens in the video?", "answer": "the red square moves"}
    lines = [said, said | {"question": "what happens?"}, {"caption": "a red square"}, said, said, said]
    return write_data(tmp_path_factory.mktemp("vlm") / "data", lines)


def collator_of(family, **options):
    fixed = family in FIXED_FRAMES
    return VlmCollator(processor_of(family), **{"fps": 100 if fixed else 1, "max_frames": 2 if fixed else 3} | options)


@EVERY
def test_batches(family, folder):
    """Labels are the answer and what ends it, words are question's and answer's, prompts are padded on the left."""
    collator, samples = collator_of(family), read_samples(folder)[:3]
    batch, decode = collator(samples), collator.processor.tokenizer.decode
    for row, sample in enumerate(samples):
        ids, labels, words = (batch[name][row] for name in ("input_ids", "labels", "text_token_mask"))
        learnt = decode(labels[labels != -100], skip_special_tokens=True).strip()
        assert learnt == sample.answer
        assert decode(ids[words.bool() & (labels != -100)]).strip() == sample.answer
        assert decode(ids[words.bool() & (labels == -100)]).strip() == sample.question
    asked = collator([sample.without_answer() for sample in samples])
    assert not {"labels", "text_token_mask"} & set(asked)
    assert asked["attention_mask"][:, -1].all()
    for row in range(len(samples)):
        prompt = asked["input_ids"][row][asked["attention_mask"][row].bool()]
        whole = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert torch.equal(whole[: len(prompt)], prompt)


FRAMES_AS_IMAGES = pytest.mark.parametrize("family", [needs_torchvision(name) for name in ("gemma3", "idefics3")])


@FRAMES_AS_IMAGES
def test_frames_as_images(family, folder):
    """Where a processor has no video, each frame is an image after its time."""
    collator, (sample, *_) = collator_of(family), read_samples(folder)
    text = collator.processor.tokenizer.decode(collator([sample])["input_ids"][0])
    assert not collator.takes_videos
    assert [text.count(f"{second:.1f} s: ") for second in (0, 1, 2)] == [1, 1, 0]


@FRAMES_AS_IMAGES
def test_a_template_that_changes_the_prompt_is_refused(family, folder):
    """The error shows both texts."""
    collator, (sample, *_) = collator_of(family), read_samples(folder)
    rendered = collator.processor.chat_template

    def render(messages, **options):
        text = type(collator.processor).apply_chat_template(collator.processor, messages, **options)
        return text if options.get("add_generation_prompt") else "Thinking.\n" + text

    collator._render = lambda messages, **options: render(messages, tokenize=False, **options)
    with pytest.raises(ValueError, match=r"(?s)annotations\.jsonl:1: .*can't be told.*Without:.*With:\nThinking"):
        collator([sample])
    assert rendered == collator.processor.chat_template


@FRAMES_AS_IMAGES
def test_placeholders_that_do_not_fit_are_refused(family, folder):
    """A template that leaves the frames out."""
    collator, (sample, *_) = collator_of(family), read_samples(folder)
    image = {"gemma3": "<image_soft_token>", "idefics3": "<image>"}[family]
    process = collator._process

    def without_pictures(texts, videos, side):
        batch = process(texts, videos, side)
        batch["input_ids"][batch["input_ids"] == collator.processor.tokenizer.convert_tokens_to_ids(image)] = 100
        return batch

    collator._process = without_pictures
    with pytest.raises(ValueError, match=r"Row 0 has 0 tokens in the place of pictures, but its 2 frames"):
        collator([sample])


@FRAMES_AS_IMAGES
def test_the_longest_are_left_out_and_counted(family, folder, capsys):
    """Nothing is cut off."""
    collator, samples = collator_of(family), read_samples(folder)[:3]
    lengths = [int(collator([sample])["attention_mask"].sum()) for sample in samples]
    assert survey(collator, samples) == samples
    assert f"3 samples, {max(lengths)} tokens at most and {sum(lengths) / 3:.0f} on average" in capsys.readouterr().out
    kept = survey(collator, samples, max(lengths) - 1)
    assert len(kept) == sum(length < max(lengths) for length in lengths)
    assert f"{3 - len(kept)} longer ones left out" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="more than --max_tokens 3 tokens"):
        survey(collator, samples, 3)


RUNS = {
    "gemma3": "--pvla_weight 0.1 --pvla_words answer --pvla_pool_frames True --eval_strategy epoch",
    "idefics3": "--method lora --max_frames 2",
    "smolvlm": "--adapt both --fps 100 --max_frames 3",
    "qwen3_vl": "--adapt both --pvla_weight 0.1",
}


@pytest.mark.parametrize("family", [needs_torchvision(name) for name in RUNS])
def test_a_folder_of_data_and_a_folder_of_a_model(family, folder, tmp_path, monkeypatch, capsys):
    """All files are there, what they hold agrees, the adapter acts, and says the same when it is loaded again."""
    model, out = save(family, tmp_path / "model"), tmp_path / "out"
    given = [
        "--data",
        str(folder),
        "--model",
        str(model),
        "--output_dir",
        str(out),
        *RUN.split(),
        *RUNS[family].split(),
    ]
    monkeypatch.setattr("sys.argv", ["finetune_vlm.py", *given])
    # The other process is tried once, by the embedded default.
    monkeypatch.setattr(finetune_vlm, "check_saved", lambda *args: None)
    finetune_vlm.main()
    told = capsys.readouterr().out
    rows = [finetune_vlm.BASE, finetune_vlm.ADAPTED, finetune_vlm.OFF]
    assert all(row in told for row in rows)
    results = json.loads((out / "results.json").read_text())
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    samples = [sample for sample in read_samples(folder) if sample.split == "test"]
    assert list(results) == rows
    assert [line["truth"] for line in predictions] == [sample.answer for sample in samples]
    for row in rows:
        said = [line["answers"][row] for line in predictions]
        assert results[row]["test"] == pytest.approx(score(said, samples, "exact"))
    assert results[rows[0]]["test"] == results[rows[2]]["test"]
    assert (out / "answers.png").stat().st_size > 1000
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    monkeypatch.setattr("sys.argv", ["finetune_vlm.py", *given, "--evaluate", str(out / "adapter")])
    finetune_vlm.main()
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["answers"] == [line["answers"][rows[1]] for line in predictions]
    if family in ("gemma3", "qwen3_vl"):
        assert "pvla_loss" in told
    if "--adapt both" in RUNS[family]:
        assert set(load_adapter(load_model(str(model)), out / "adapter").active_adapters) == {"default", "vision"}
    else:
        assert isinstance(load_adapter(load_model(str(model)), out / "adapter"), PeftModel)


@pytest.mark.parametrize("family", [needs_torchvision("smolvlm")])
def test_the_embedded_default(family, tmp_path, monkeypatch, capsys):
    """Made smaller: videos and base are made once, the script runs from nothing, a new process says the same."""
    from vlm import tiny_smolvlm

    make_base, make_dataset = tiny_smolvlm.make_base, digits.make_dataset
    monkeypatch.setattr(tiny_smolvlm, "make_base", lambda path: make_base(path, samples=32, steps=2))
    counts = {"train": 8, "validation": 2, "test": 3}
    monkeypatch.setattr(finetune_vlm, "make_dataset", lambda path: make_dataset(path, counts))
    given = ["--cache", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out"), *RUN.split()]
    monkeypatch.setattr("sys.argv", ["finetune_vlm.py", *given])
    finetune_vlm.main()
    told = capsys.readouterr().out
    assert "the same answers to 2 test samples" in told
    assert "mIoU" in told
    assert "READ for digits in order" in (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"model", "videos"}

    """Made whole below: TRL is imported by one test."""


@pytest.mark.parametrize(
    "family", [needs_torchvision(name) for name in ("gemma3", "smolvlm", "qwen2_5_vl", "internvl")]
)
def test_sft(family, folder, tmp_path, caplog):
    """TRL's trainer with PVLA: the losses add up and READ's weights move."""
    trl = pytest.importorskip("trl")

    @dataclass
    class SftArguments(peft_read.PvlaArguments, trl.SFTConfig):
        pass

    class SftTrainer(peft_read.PvlaMixin, trl.SFTTrainer):
        pass

    samples, collator = read_samples(folder), collator_of(family)
    model = strengthen(get_peft_model(base_model(family), peft_read.ReadConfig(r=4)))
    before = {name: value.clone() for name, value in model.state_dict().items() if ".read_" in name}
    args = SftArguments(
        str(tmp_path),
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        pvla_weight=0.5,
        pvla_words="answer",
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
        bf16=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    with caplog.at_level(logging.INFO, logger="peft_read"):
        trainer = SftTrainer(
            model,
            args,
            train_dataset=Dataset.from_list([{"number": number} for number in range(2)]),
            data_collator=lambda rows: collator([samples[row["number"]] for row in rows]),
            processing_class=processor_of(family),
        )
    assert "for video" in caplog.text
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["task_loss"] + 0.5 * log["pvla_loss"], abs=1e-4)
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
