"""Training runs as users make them, by one process or two, plainly or sharded, and what is compared of them."""

import gc
import os
import signal
import socket
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from accelerate import DistributedType, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from alignment import CASES, arguments, trainer_of
from alignment_batches import marked, random, words
from peft import get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp1
from torch.distributed.tensor import DTensor
from transformers import (
    ASTConfig,
    ASTModel,
    BertConfig,
    BertModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTModel,
    default_data_collator,
)

from peft_read import (
    LsttaConfig,
    TrimodalForConditionalGeneration,
    TrimodalForMultipleChoice,
    TrimodalForRetrieval,
    TrimodalForSequenceClassification,
)


CONFIGURATIONS = Path(__file__).parents[2] / "examples" / "accelerate"
STEPS, EPOCH = 20, 7  # steps of a run, and of an epoch
# Of 8 examples, in two accumulated batches.
OPTIONS = {
    "max_steps": STEPS,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "random",
    "per_device_eval_batch_size": 2,
}
EXAMPLES = 8 * EPOCH
SAVED, KILLED = 9, 11  # steps after which a run is saved, and in which it is killed: in the middle of the second epoch
UNEVEN = (7, 13)  # evaluated examples
# Plain gradient descent shows a gradient of the wrong size; its momentum has to survive a resumed run.
OPTIMIZER = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9})}

# transformers 5.17 restores an optimizer to "cpu:0", which torch doesn't take for a place; 5.23 names another.
torch.serialization.register_package(
    0, lambda storage: None, lambda storage, location: storage if location == "cpu:0" else None
)


def read_with_pvla(folder, batch, **options):
    """A text encoder with READ, trained with PVLA; some examples hold no video."""
    case = replace(CASES["text encoder"], arguments=OPTIMIZER)
    data = marked(EXAMPLES, videos="some")
    options = OPTIONS | {"pvla_weight": 0.7} | options
    return trainer_of(case, case.model(), folder, data, data, batch, **options)


TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def three_towers():
    torch.manual_seed(0)
    model = TrimodalForSequenceClassification.from_pretrained_towers(
        vision=ViTModel(ViTConfig(image_size=16, patch_size=8, **TOWER)),
        audio=ASTModel(ASTConfig(num_mel_bins=16, max_length=32, **TOWER)),
        text=BertModel(BertConfig(vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **TOWER)),
        num_labels=3,
        projection_dim=16,
    )
    config = LsttaConfig(r=8, num_heads=2, window=2, init_weights=False, modules_to_save=["classifier", "fusion"])
    return get_peft_model(model, config)


def clips(rows):
    """Pictures, sound and text; clips of one to four frames."""
    return [
        {
            "pixel_values": random(4, 3, 16, 16, seed=row),
            "frame_mask": torch.arange(4) <= row % 4,
            "input_values": random(32, 16, seed=row),
            "input_ids": words(row, 6) % 50,
            "labels": torch.tensor(row % 3),
        }
        for row in range(rows)
    ]


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}


def under_head(cls):
    """The towers of `three_towers` under another head."""
    torch.manual_seed(0)
    writes = cls is TrimodalForConditionalGeneration
    model = cls.from_pretrained_towers(
        vision=ViTModel(ViTConfig(image_size=16, patch_size=8, **TOWER)),
        audio=ASTModel(ASTConfig(num_mel_bins=16, max_length=32, **TOWER)),
        text=T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **T5))
        if writes
        else BertModel(BertConfig(vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **TOWER)),
        projection_dim=16,
    )
    config = LsttaConfig(r=8, num_heads=2, window=2, init_weights=False, modules_to_save=list(cls.new_parts))
    return get_peft_model(model, config)


HEADS = {
    "lstta": three_towers,
    "generation": lambda: under_head(TrimodalForConditionalGeneration),
    "choice": lambda: under_head(TrimodalForMultipleChoice),
    "retrieval": lambda: under_head(TrimodalForRetrieval),
}


def clips_for(name, rows):
    """What each of `HEADS` trains on: sentences to write, one of three to choose, or one to find."""
    data = clips(rows)
    for row, example in enumerate(data):
        if name == "generation":
            example["labels"] = torch.tensor([5, 9, 12]) + row % 3
        elif name == "choice":
            example["input_ids"] = torch.stack([words(row + rows * number, 6) for number in range(3)]) % 50
        elif name == "retrieval":
            del example["labels"]
    return data


def in_lockstep(name, folder, batch, **options):
    """Three towers in lockstep, under one of `HEADS`."""
    given = {key: value for key, value in arguments(folder, batch).items() if not key.startswith("pvla_")}
    options = OPTIONS | {"label_names": [] if name == "retrieval" else ["labels"]} | options
    trainer, training = Trainer, TrainingArguments
    if name == "generation":
        trainer, training = Seq2SeqTrainer, Seq2SeqTrainingArguments
        options |= {"predict_with_generate": True, "generation_max_length": 4, "generation_num_beams": 2}
    elif name == "retrieval":  # pairs are told apart within a process's batch, so that is of one size
        options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": batch}
    data = clips_for(name, EXAMPLES)
    trainer = trainer(HEADS[name](), training(**(given | options)), default_data_collator, data, data)
    trainer.optimizer_cls_and_kwargs = OPTIMIZER["optimizer_cls_and_kwargs"]  # no argument of `Seq2SeqTrainer`
    return trainer


TRAINERS = {"read": read_with_pvla} | {name: partial(in_lockstep, name) for name in HEADS}


@dataclass
class Found:
    """What a process found in a run.

    Attributes:
        trained: steps that it trained itself.
        logs: of each step.
        predictions: of `UNEVEN` examples each; of clips and sentences the loss of all.
        saved: the weights in the adapter's file.
        held: by parameter, how many numbers of it this process holds, and how many it has.
        units: classes of the modules that are sharded as a unit.
    """

    trained: int
    logs: list
    predictions: list
    saved: dict | None
    held: dict
    units: set


def run(name, folder, processes=1, strategy="ddp", resume=False, callback=None, **options):
    """One of `TRAINERS`, as this process sees it; the adapter is saved below `folder`."""
    with fsdp(strategy) if strategy != "ddp" else nullcontext():
        trainer = TRAINERS[name](folder, 4 // processes, **options)
        counter = CountSteps()
        trainer.add_callback(counter)
        if callback is not None:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        model = trainer.model
        if name == "retrieval":  # whose logits are those of a batch
            predictions = [trainer.evaluate()["eval_loss"]]
        else:
            # Of several processes `Seq2SeqTrainer` gives what fills up the last batch as well.
            predictions = [trainer.predict(trainer.eval_dataset[:count]).predictions for count in UNEVEN]
            if name == "generation":
                predictions = [each[:count] for each, count in zip(predictions, UNEVEN, strict=True)]
        adapter = folder / "adapter"
        if strategy != "fsdp1":  # which can't gather its weights on CPUs
            trainer.save_model(str(adapter))
            trainer.accelerator.wait_for_everyone()
        return Found(
            counter.steps,
            [entry for entry in trainer.state.log_history if "loss" in entry],
            predictions,
            load_file(adapter / "adapter_model.safetensors") if adapter.exists() else None,
            {plain(n): (local(p).numel(), p.numel()) for n, p in model.named_parameters()},
            {type(m).__mro__[2].__name__ for m in model.modules() if isinstance(m, FSDPModule)}
            | {type(m.module).__name__ for m in model.modules() if isinstance(m, Fsdp1)},
        )


def same_predictions(name, mine, other):
    """Whether two runs of one of `TRAINERS` predict the same, each example once."""
    width = 20 if name == "generation" else 3  # which its Trainer fills up
    for each in (mine, other) if name != "retrieval" else ():
        shapes = [prediction.shape for prediction in each.predictions]
        assert shapes == [(count, width) for count in UNEVEN], shapes
    for one, another in zip(mine.predictions, other.predictions, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(another), rtol=0, atol=1e-4)


def plain(name):
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def local(parameter):
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def launch_arguments(configuration, *given):
    """What `accelerate launch` makes of one of the example configurations."""
    given = ["--config_file", str(CONFIGURATIONS / f"{configuration}.yaml"), "--num_processes", "2", *given]
    return _validate_launch_command(launch_command_parser().parse_args([*given, "script.py"]))[0]


@contextmanager
def fsdp(strategy):
    """What `accelerate launch --config_file fsdp2.yaml` tells its processes, and FSDP on CPUs.

    There Accelerate silently falls back on DDP, which torch's FSDP doesn't need. `"fsdp1"`: the same by the older one.
    """
    environment = prepare_multi_gpu_env(launch_arguments("fsdp2"))
    environment = {name: value for name, value in environment.items() if name not in os.environ}
    if strategy == "fsdp1":
        environment |= {
            "FSDP_VERSION": "1",
            "FSDP_USE_ORIG_PARAMS": "false",
            "FSDP_SYNC_MODULE_STATES": "false",
            "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD",
        }
    environment.pop("OMP_NUM_THREADS", None)
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as Accelerate itself does

    wrap = Fsdp1.__init__

    def init_fsdp1(self, *args, device_id, **kwargs):
        wrap(self, *args, device_id=torch.device("cpu"), **kwargs)  # CPUs have no numbers there

    with (
        patch_environment(**environment),
        mock.patch.object(AcceleratorState, "__init__", init),
        mock.patch.object(Fsdp1, "__init__", init_fsdp1),
    ):
        yield


class CountSteps(TrainerCallback):
    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


class Kill(TrainerCallback):
    """kill -9, between the two batches of a step."""

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == KILLED - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def join(rank, port):
    """Make this process the one of that rank of two."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    gc.freeze()  # as `conftest.py` does
