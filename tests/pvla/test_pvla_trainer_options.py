"""The Trainers with PVLA: what they evaluate, log and leave alone, beside which other things, and what they refuse."""

import copy
import json
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from alignment import (
    CASES,
    CAUSAL,
    Case,
    alignment,
    arguments,
    collate,
    forward,
    step_by_hand,
    steps_logged,
    tokenizer,
    trainer_of,
    weights,
)
from alignment_batches import generated, marked, pictured, places, spoken
from alignment_models import adapt, bert, build
from alignment_runs import named, read_gradients, trained, without_video
from datasets import Dataset, IterableDataset
from helpers import EXACT, adapter_parameters, strengthen
from models import classifier, llama_config
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import (
    HfArgumentParser,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from peft_read import (
    PvlaArguments,
    PvlaMixin,
    PvlaSeq2SeqTrainingArguments,
    PvlaTrainer,
    PvlaTrainingArguments,
    ReadConfig,
    VideoTextStates,
)


TEXT = CASES["text encoder"]


@pytest.mark.parametrize(
    ("name", "generate"), [("text encoder", False), ("encoder-decoder", False), ("encoder-decoder", True)]
)
def test_evaluation(name, generate, tmp_path):
    """The parts of the loss are means over all samples, whatever the last batch's size; they add up to the loss."""
    case = CASES[name]
    options = {"predict_with_generate": True, "generation_max_length": 8} if generate else {}
    data, model = case.data()[:7], case.model().eval()
    seen = []
    model.get_base_model().register_forward_pre_hook(lambda m, a, kwargs: seen.extend(kwargs), with_kwargs=True)
    trainer = trainer_of(case, model, tmp_path, evaluate=data, batch=3, pvla_weight=0.7, **options)
    metrics = trainer.evaluate()
    parts = []
    with torch.no_grad():
        for examples in (data[:3], data[3:6], data[6:]):
            task, pairs = forward(case, model, collate(case, examples))
            parts += [(float(task), float(alignment(pairs)))] * len(examples)
    task, aligned = torch.tensor(parts).mean(0).tolist()
    assert metrics["eval_task_loss"] == pytest.approx(task, abs=1e-5)
    assert metrics["eval_pvla_loss"] == pytest.approx(aligned, abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(task + 0.7 * aligned, abs=1e-5)
    predicted = trainer.predict(data)
    assert len(predicted.predictions if generate or not case.seq2seq else predicted.predictions[0]) == 7
    assert predicted.metrics["test_pvla_loss"] == pytest.approx(aligned, abs=1e-5)
    assert not any("token_mask" in name for name in seen)
    if case.seq2seq and not generate:
        return  # BART doesn't run without labels
    unlabelled = trainer.predict([{k: v for k, v in example.items() if k != "labels"} for example in data])
    assert "test_pvla_loss" not in unlabelled.metrics


def test_evaluation_with_smoothing_and_generation(tmp_path):
    """There the sequence-to-sequence Trainer takes the smoothed loss by itself; the alignment is added to it, too."""
    case = CASES["encoder-decoder"]
    options = {"predict_with_generate": True, "generation_max_length": 8, "label_smoothing_factor": 0.2}
    # As a collator has to make them for smoothing, where the model doesn't see the labels.
    data = [example | {"decoder_input_ids": example["labels"].roll(1)} for example in generated()]
    trainer = trainer_of(case, case.model(), tmp_path, evaluate=data, pvla_weight=0.7, **options)
    metrics = trainer.evaluate()
    trainer.args.pvla_weight = 0.0
    assert metrics["eval_task_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_task_loss"] + 0.7 * metrics["eval_pvla_loss"], abs=1e-5)


def plain(trainer_cls, arguments_cls, model, folder, data, **options):
    arguments = {"per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "report_to": "none"}
    arguments |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "eval_strategy": "steps"}
    arguments |= {"eval_steps": 2, "save_strategy": "no", "learning_rate": 1e-2}
    args = arguments_cls(str(folder), **arguments, **options)
    trainer = trainer_cls(model, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    return trainer


def test_no_weight_is_the_plain_trainer(tmp_path):
    """Bit for bit the same weights and logs, no hook on the model, no need to tell video from text."""
    columns = ("attention_mask", "labels", "input_ids")
    data = [{name: example[name] for name in columns} for example in marked(embedded=False)]
    expected = plain(Trainer, TrainingArguments, bert(), tmp_path, data)
    model = bert()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    trainer = plain(PvlaTrainer, PvlaTrainingArguments, model, tmp_path, data, pvla_weight=0.0)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert trainer.model_accepts_loss_kwargs == expected.model_accepts_loss_kwargs
    for name, value in weights(expected.model).items():
        torch.testing.assert_close(weights(model)[name], value, **EXACT)
    timed = ("runtime", "per_second")
    logs, others = (
        [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in t.state.log_history]
        for t in (trainer, expected)
    )
    assert logs == others
    # Marks in the data are kept from the model then as well.
    plain(PvlaTrainer, PvlaTrainingArguments, bert(), tmp_path, marked(embedded=False), pvla_weight=0.0)


def test_columns_of_a_dataset(tmp_path):
    """The marks survive the removal of columns that the model doesn't know, and never reach the model."""
    rows = [{name: value.tolist() for name, value in example.items()} for example in marked(embedded=False)]
    data = Dataset.from_list([row | {"unused": "text"} for row in rows])
    model = bert()
    seen = []
    model.get_base_model().register_forward_pre_hook(lambda m, a, kwargs: seen.append({*kwargs}), with_kwargs=True)
    trainer = trainer_of(TEXT, model, tmp_path, data, data, remove_unused_columns=True)
    trainer.train()
    assert "eval_pvla_loss" in trainer.evaluate()
    expected = step_by_hand(TEXT, bert(), marked(embedded=False), 0.05)
    assert steps_logged(trainer)[0]["pvla_loss"] == pytest.approx(float(expected[1]), abs=1e-5)
    assert seen
    assert not any(name.endswith("token_mask") for names in seen for name in names)


def test_a_stream_of_data(tmp_path):
    """An `IterableDataset`, of which nothing is known before training."""
    rows = [{name: value.tolist() for name, value in example.items()} for example in marked(embedded=False)]
    data = IterableDataset.from_generator(lambda: iter(rows))
    trainer = trainer_of(TEXT, bert(), tmp_path, data, data, max_steps=1)
    trainer.train()
    expected = step_by_hand(TEXT, bert(), marked(embedded=False), 0.05)
    assert steps_logged(trainer)[0]["pvla_loss"] == pytest.approx(float(expected[1]), abs=1e-5)


def test_flags():
    """`HfArgumentParser` turns the options into flags."""
    flags = ["--output_dir", "x", "--pvla_gradient_share", "0.1", "--pvla_cost", "sqeuclidean", "--pvla_plot_plans"]
    flags += ["--pvla_states", "all_blocks", "--pvla_mass", "0.25", "--predict_with_generate"]
    (args,) = HfArgumentParser(PvlaSeq2SeqTrainingArguments).parse_args_into_dataclasses(flags)
    assert args.pvla_gradient_share == 0.1
    assert (args.pvla_cost, args.pvla_states, args.pvla_mass) == ("sqeuclidean", "all_blocks", 0.25)
    assert args.pvla_plot_plans
    assert args.predict_with_generate
    assert args.pvla_loss().cost == "sqeuclidean"
    assert json.loads(args.to_json_string())["pvla_mass"] == 0.25


def without_marks(example):
    return {name: value for name, value in example.items() if "token_mask" not in name}


def test_refused_at_construction(tmp_path, monkeypatch):
    """What can't work is said before a step is made, and how to mend it."""

    def make(model, data=None, arguments=None, **given):
        args = arguments or PvlaTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        return PvlaTrainer(model, args, train_dataset=marked() if data is None else data, **given)

    with pytest.raises(ValueError, match="get_peft_model"):
        make(classifier())
    with pytest.raises(ValueError, match=r"video_token_mask.*pvla_states"):
        make(bert(), [without_marks(example) for example in marked()])
    with pytest.raises(TypeError, match="TrainingArguments, which has no options of PVLA"):
        make(bert(), arguments=TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="'layers': expected a function or one of 'auto'"):
        make(bert(), pvla_states="layers")
    with pytest.raises(ValueError, match="no dual encoder"):
        make(bert(), pvla_states="towers")
    args = PvlaTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    args.device  # noqa: B018  (sets the devices up, which is done once)
    args._n_gpu = 2
    monkeypatch.setattr(nn, "DataParallel", nn.Identity)
    with pytest.raises(ValueError, match="torchrun"):
        make(bert(), arguments=args)
    for option, value in (
        ("pvla_weight", -1.0),
        ("pvla_weight", float("nan")),
        ("pvla_gradient_share", 0.0),
        ("pvla_mass", 0.0),
        ("pvla_mass", 1.5),
        ("pvla_reg", 0.0),
        ("pvla_iterations", 0),
        ("pvla_cost", "l1"),
        ("pvla_marginals", "free"),
        ("pvla_health_steps", -1),
    ):
        with pytest.raises(ValueError, match=option.removeprefix("pvla_").replace("iterations", "n_iter")):
            PvlaTrainingArguments(str(tmp_path), use_cpu=True, **{option: value})
    with pytest.raises(ValueError, match=r"pvla_weight=0\.7 .*pvla_gradient_share=0\.1: give one of them"):
        PvlaTrainingArguments(str(tmp_path), use_cpu=True, pvla_weight=0.7, pvla_gradient_share=0.1)


def test_refused_in_training(tmp_path):
    """Marks that don't fit the sequence, and states that no adapter has a part in."""
    short = [example | {n: example[n][:-1] for n in ("video_token_mask", "text_token_mask")} for example in marked()]
    with pytest.raises(ValueError, match="token masks have shape"):
        trained(TEXT, tmp_path, train=short)

    def of_inputs(model, batch, outputs):
        return VideoTextStates(batch["inputs_embeds"][:, :3], batch["inputs_embeds"][:, 3:])

    with pytest.raises(RuntimeError, match="no gradient"):
        trained(Case(bert, marked, None, arguments={"pvla_states": of_inputs}), tmp_path)


def test_states_before_the_adapters(tmp_path):
    """States of another trained part give READ no gradient: they take a fixed weight, there is no share to measure."""
    config = llama_config(tie_word_embeddings=False)

    def embedded(model, batch, outputs):
        states = model.get_input_embeddings()(batch["input_ids"])
        return VideoTextStates(states[:, :3], states[:, 3:], met=False)

    case = Case(
        lambda: build(LlamaForCausalLM, config, modules_to_save=["embed_tokens"]),
        spoken,
        None,
        arguments={"pvla_states": embedded},
    )
    first = trained(case, tmp_path, pvla_health_steps=1)[0][0]
    assert first["pvla_loss"] > 0
    assert "pvla_gap" in first
    assert "pvla_gradient_share" not in first
    with pytest.raises(RuntimeError, match="reaches none of READ's weights"):
        trained(case, tmp_path, pvla_gradient_share=0.1)


def test_adapters_beside_each_other(tmp_path):
    """Several adapters, of which one is active; a model that was copied or pickled with its Trainer's hooks."""
    model = bert()
    model.add_adapter("other", ReadConfig(r=2, modules_to_save=["classifier"]))
    model.set_adapter("other")
    strengthen(model, adapter_name="other")
    after = step_by_hand(TEXT, model, marked(), 0.7)[-1]
    kept = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    trainer = trainer_of(TEXT, model, tmp_path, marked(), pvla_weight=0.7)
    trainer.train()
    for name, value in weights(model).items():
        torch.testing.assert_close(value, after[name], rtol=1e-3, atol=1e-6)
    for name, value in kept.items():
        torch.testing.assert_close(adapter_parameters(model)[name], value, **EXACT)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        trained(Case(lambda again=again: again, marked, None), tmp_path)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_lora_beside(tmp_path):
    """LoRA in the attention, READ at the feed-forward parts: both are trained, the share counts READ's weights."""
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["query"], init_lora_weights=False)
    model = adapt(inject_adapter_in_model(lora, classifier(), "lora"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".read_" in name or "lora_" in name)
    task, aligned = read_gradients(TEXT, model, marked())
    after = step_by_hand(TEXT, model, marked(), 0.1 * task / aligned)[-1]
    trainer = trainer_of(TEXT, model, tmp_path, marked(), pvla_gradient_share=0.1)
    trainer.train()
    assert any("lora_" in name for name in after)
    for name, value in weights(model).items():
        torch.testing.assert_close(value, after[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("states", ["last_block", "all_blocks", "bottleneck"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sources_by_adapters_dtype(states, dtype, tmp_path):
    """Adapters in bfloat16 train as well, by every source of states in the blocks."""
    model = bert(cell="none").to(dtype)
    data = [example | {"inputs_embeds": example["inputs_embeds"].to(dtype)} for example in marked()]
    before = weights(model)
    logs, after = trained(Case(lambda: model, None, None), tmp_path, train=data, evaluate=data, pvla_states=states)
    assert 0 < logs[0]["pvla_loss"] < 2
    assert any(not torch.equal(before[name], after[name]) for name in before if ".read_" in name)


@pytest.mark.parametrize(
    "options",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"eval_accumulation_steps": 1},
        {"dataloader_drop_last": True},
        {"bf16_full_eval": True},
        {"include_for_metrics": ["inputs", "loss"]},
        {"batch_eval_metrics": True},
        {"dataloader_num_workers": 1},
        {"pvla_weight": 0.0, "pvla_gradient_share": 0.1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_trainer(options, tmp_path):
    """They work as they do without PVLA, in training, in evaluation after it and in prediction."""
    trainer = trainer_of(TEXT, bert(), tmp_path, named(), named(), batch=3, **options)
    trainer.compute_metrics = lambda predictions, compute_result=True: {"rows": len(predictions.predictions)}
    trainer.train()
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_pvla_loss"] < 2
    trainer.predict(named(4))
    steps = len(steps_logged(trainer))
    assert steps == (2 if "dataloader_drop_last" in options else 3)


def test_rows_without_text_or_anything(tmp_path):
    """Empty sentences, and batches in which nothing can be aligned, count in the task only."""
    data = marked(6)
    data[0] = data[0] | {"text_token_mask": places()}
    data[4:] = [without_video(example) for example in data[4:]]
    logs, after = trained(TEXT, tmp_path, train=data, batch=2, pvla_weight=0.7)
    with torch.no_grad():
        pairs = forward(TEXT, bert(), collate(TEXT, data[:2]))[1]
    assert len(pairs) == 1
    assert logs[0]["pvla_loss"] == pytest.approx(float(alignment(pairs)), abs=1e-5)
    assert logs[2]["pvla_loss"] == 0
    assert all(torch.isfinite(value).all() for value in after.values())
    metrics = trainer_of(TEXT, bert(), tmp_path, evaluate=data[4:], pvla_plot_plans=True).evaluate()
    assert metrics["eval_pvla_loss"] == 0


def ragged(examples):
    """A collator of one's own: rows of other lengths, padded on the right."""
    rows = {name: [torch.as_tensor(example[name]) for example in examples] for name in examples[0]}
    rows["attention_mask"] = [torch.ones_like(ids) for ids in rows["input_ids"]]
    padding = {"labels": -100}
    return {name: nn.utils.rnn.pad_sequence(row, True, padding.get(name, 0)) for name, row in rows.items()}


@pytest.mark.parametrize("name", ["llama", "llava"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trl(name, tmp_path):
    """The mixin makes TRL's Trainer one with PVLA: the same losses as ours, its own metrics beside them."""
    trl = pytest.importorskip("trl", minversion="1.16", reason="older ones need Triton in this Trainer")

    @dataclass
    class Arguments(PvlaArguments, trl.SFTConfig):
        pass

    class PvlaSFTTrainer(PvlaMixin, trl.SFTTrainer):
        pass

    case, rows = CASES["image placeholders"], pictured()
    if name == "llama":
        case = replace(CAUSAL, collator=ragged)
        rows = [{k: v[: int(row["attention_mask"].sum())] for k, v in row.items()} for row in spoken()]
    data = Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows])
    model = case.model()
    task, aligned, _, after = step_by_hand(case, model, list(data), 0.7)
    options = {"pvla_weight": 0.7, "bf16": False, "gradient_checkpointing": False, "eos_token": None}
    options |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": name == "llama"}
    # Of a text model only the columns that TRL knows are kept, and the marks.
    trainer = PvlaSFTTrainer(
        model,
        Arguments(**arguments(tmp_path), **options),
        data_collator=case.collator or default_data_collator,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
    )
    trainer.train()
    (log,) = steps_logged(trainer)
    assert log["task_loss"] == pytest.approx(float(task), abs=1e-5)
    assert log["pvla_loss"] == pytest.approx(float(aligned), abs=1e-5)
    assert log["loss"] == pytest.approx(float(task + 0.7 * aligned), abs=1e-5)
    assert "mean_token_accuracy" in log
    for parameter, value in weights(model).items():
        torch.testing.assert_close(value, after[parameter], rtol=1e-3, atol=1e-6)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_task_loss"] + 0.7 * metrics["eval_pvla_loss"], abs=1e-5)
