"""What PVLA should make of video and text in a tiny model, computed by hand, and Trainers for it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import ot
import tokenizers
import torch
from alignment_batches import (
    SAMPLES,
    captioned,
    filmed,
    generated,
    images_in_a_row,
    joined,
    marked,
    pictured,
    spoken,
    stacked,
)
from alignment_models import (
    FRAMES,
    VIDEO,
    VISUAL,
    albert,
    bart,
    bert,
    build,
    clip,
    llava,
    qwen2_vl,
    siglip,
    xclip,
)
from models import VOCAB, llama_config
from torch import nn
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from peft_read import (
    PvlaLoss,
    PvlaSeq2SeqTrainer,
    PvlaSeq2SeqTrainingArguments,
    PvlaTrainer,
    PvlaTrainingArguments,
)


RATE = 0.1


# Of the loss; smoother and better converged than the defaults, so that another solver finds the same to 1e-5.
REG, ITERATIONS = 0.2, 200


def retrieval_loss(outputs, labels, num_items_in_batch=None):
    """Of several frames for a text: each text against the mean of each video's frames."""
    texts = len(outputs.text_embeds)
    videos = outputs.image_embeds.unflatten(0, (texts, -1)).mean(1)
    return nn.functional.cross_entropy(5 * outputs.text_embeds @ videos.T, torch.arange(texts))


@dataclass
class Case:
    """A source of states: a model, its data, and what is compared, by hand.

    Attributes:
        model: builds it, adapted.
        data: its samples.
        compared: of the model, a batch and its outputs, with `heard` (outputs of modules by name): the states of video
            and of words, `(frames, dim)` and `(words, dim)`, for each sample that has both.
        heard: modules to whose outputs it listens.
    """

    model: Callable[[], nn.Module]
    data: Callable[[], list]
    compared: Callable
    heard: tuple[str, ...] = ()
    collator: Callable | None = None
    options: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    seq2seq: bool = False


def of_masks(name):
    """Marked positions that aren't padding, in a module's output."""

    def compared(model, batch, outputs, heard):
        states, pairs = heard[name], []
        for row in range(len(states)):
            valid = batch["attention_mask"][row].bool()
            video, text = (states[row][valid & batch[f"{k}_token_mask"][row].bool()] for k in ("video", "text"))
            if len(video) and len(text):
                pairs.append((video, text))
        return pairs

    return compared


def of_all(*names):
    return lambda *given: [pair for name in names for pair in of_masks(name)(*given)]


def of_placeholders(name, token):
    def compared(model, batch, outputs, heard):
        pairs = []
        for states, ids, valid in zip(heard[name], batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            pairs.append((states[valid & (ids == token)], states[valid & (ids != token)]))
        return pairs

    return compared


def of_towers(frames, text):
    def compared(model, batch, outputs, heard):
        base = model.get_base_model()
        lengths = batch["attention_mask"].sum(1)
        states = text(base, outputs.text_model_output.last_hidden_state)
        return [(video, word[:n]) for video, word, n in zip(frames(base, outputs), states, lengths, strict=True)]

    return compared


def clip_text(base, states):
    return base.text_projection(states)


def clip_patches(base, outputs):
    states = outputs.vision_model_output.last_hidden_state
    return base.visual_projection(base.vision_model.post_layernorm(states))


def first_tokens(model, batch, outputs):
    """A user's own function: the decoder's states as words, the encoder's valid ones as frames."""
    from peft_read import VideoTextStates

    return VideoTextStates(
        outputs.encoder_last_hidden_state, outputs.decoder_hidden_states[-1], frame_mask=batch["attention_mask"]
    )


def of_function(model, batch, outputs, heard):
    lengths = batch["attention_mask"].sum(1)
    rows = zip(outputs.encoder_last_hidden_state, outputs.decoder_hidden_states[-1], lengths, strict=True)
    return [(frames[:n], spoken) for frames, spoken, n in rows]


def states_function_bart():
    model = bart()
    model.config.output_hidden_states = True
    return model


BERT = "base_model.model.bert.encoder.layer.{}"


DOWN = BERT + ".output.dense.read_downward.default"


CASES = {
    "text encoder": Case(bert, lambda: marked(videos="some"), of_masks(BERT.format(1)), (BERT.format(1),)),
    "all blocks": Case(
        bert,
        lambda: marked(videos="some"),
        of_all(BERT.format(0), BERT.format(1)),
        (BERT.format(0), BERT.format(1)),
        options={"pvla_states": "all_blocks"},
    ),
    "shared blocks": Case(
        albert,
        marked,
        of_masks("base_model.model.albert.encoder.albert_layer_groups.0"),
        ("base_model.model.albert.encoder.albert_layer_groups.0",),
    ),
    "bottleneck without recurrence": Case(
        lambda: bert(cell="none", act_fn="tanh"),
        marked,
        lambda m, b, o, heard: of_masks(DOWN.format(1))(m, b, o, {n: s.tanh() for n, s in heard.items()}),
        (DOWN.format(1),),
        options={"pvla_states": "bottleneck"},
    ),
    "encoder-decoder": Case(
        bart,
        generated,
        of_masks("base_model.model.model.encoder.layers.1"),
        ("base_model.model.model.encoder.layers.1",),
        seq2seq=True,
    ),
    "function": Case(
        states_function_bart, generated, of_function, arguments={"pvla_states": first_tokens}, seq2seq=True
    ),
    "image placeholders": Case(
        llava,
        pictured,
        of_placeholders("base_model.model.model.language_model.layers.1", VISUAL),
        ("base_model.model.model.language_model.layers.1",),
    ),
    "video placeholders": Case(
        qwen2_vl,
        filmed,
        of_placeholders("base_model.model.model.language_model.layers.1", VIDEO),
        ("base_model.model.model.language_model.layers.1",),
        collator=joined,
    ),
    "clip, patches": Case(clip, captioned, of_towers(clip_patches, clip_text), collator=stacked),
    "clip, frames": Case(
        clip,
        lambda: captioned(FRAMES),
        of_towers(lambda _, outputs: outputs.image_embeds.unflatten(0, (-1, FRAMES)), clip_text),
        collator=images_in_a_row,
        arguments={"compute_loss_func": retrieval_loss},
    ),
    "x-clip": Case(
        xclip,
        lambda: captioned(FRAMES),
        of_towers(lambda _, outputs: outputs.mit_output.last_hidden_state, clip_text),
        collator=stacked,
    ),
    "siglip": Case(
        siglip,
        captioned,
        of_towers(
            lambda _, outputs: outputs.vision_model_output.last_hidden_state,
            lambda base, states: base.text_model.head(states),
        ),
        collator=stacked,
    ),
}


LLAMA = "base_model.model.model.layers.1"


# Of which the loss is divided by the labels of all batches that are accumulated, on all devices.
CAUSAL = Case(lambda: build(LlamaForCausalLM, llama_config()), spoken, of_masks(LLAMA), (LLAMA,))


def collate(case, examples):
    if case.collator is not None:
        return case.collator(examples)
    return {name: torch.stack([torch.as_tensor(example[name]) for example in examples]) for name in examples[0]}


def forward(case, model, batch):
    """Task loss and compared states of a batch, from a plain forward with plain hooks."""
    heard = {}

    def listen(name):
        return lambda module, args, output: heard.update({name: output if torch.is_tensor(output) else output[0]})

    hooks = [model.get_submodule(name).register_forward_hook(listen(name)) for name in case.heard]
    outputs = model(**{name: value for name, value in batch.items() if "token_mask" not in name})
    for hook in hooks:
        hook.remove()
    loss_function = case.arguments.get("compute_loss_func")
    task = outputs.loss if loss_function is None else loss_function(outputs, None)
    return task, case.compared(model, batch, outputs, heard)


def alignment(pairs):
    """Mean over samples of PVLA's distance, one sample at a time."""
    loss = PvlaLoss(reg=REG, n_iter=ITERATIONS)
    return torch.stack([loss(video[None], text[None]) for video, text in pairs]).mean()


def alignment_by_pot(pairs, mass=0.5):
    """The same by another library, in float64."""
    distances = []
    for video, text in pairs:
        x, y = (nn.functional.normalize(z.detach().double(), dim=-1) for z in (video, text))
        cost = (1 - x @ y.T).numpy()
        share = 1 / min(cost.shape)
        a, b = ([share] * size for size in cost.shape)
        plan = ot.partial.entropic_partial_wasserstein(a, b, cost, reg=REG, m=mass, numItermax=5000)
        distances.append((plan * cost).sum() / mass)
    return sum(distances) / len(distances)


def step_by_hand(case, model, examples, weight):
    """Losses of a step of gradient descent over the examples, and the weights after it."""
    model = copy.deepcopy(model).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    task, pairs = forward(case, model, collate(case, examples))
    aligned = alignment(pairs)
    grads = torch.autograd.grad(task + weight * aligned, list(trained.values()), allow_unused=True)
    after = {
        name: p.detach() - (0 if g is None else RATE * g) for (name, p), g in zip(trained.items(), grads, strict=True)
    }
    return task.detach(), aligned.detach(), alignment_by_pot(pairs), after


def trainer_of(case, model, folder, train=None, evaluate=None, batch=SAMPLES, processing_class=None, **options):
    """The case's Trainer: plain gradient descent, every step logged, as many steps as batches."""
    arguments_cls = PvlaSeq2SeqTrainingArguments if case.seq2seq else PvlaTrainingArguments
    trainer_cls = PvlaSeq2SeqTrainer if case.seq2seq else PvlaTrainer
    return trainer_cls(
        model,
        arguments_cls(**(arguments(folder, batch) | case.options | options)),
        data_collator=case.collator or default_data_collator,
        train_dataset=case.data() if train is None else train,
        eval_dataset=case.data() if evaluate is None else evaluate,
        processing_class=processing_class,
        **case.arguments,
    )


def arguments(folder, batch=SAMPLES):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "pvla_reg": REG,
        "pvla_iterations": ITERATIONS,
        "pvla_health_steps": 0,
    }


def tokenizer():
    """Words named after their numbers."""
    vocabulary = {f"w{number}": number for number in range(VOCAB)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="w0", eos_token="w1", unk_token="w2")


def steps_logged(trainer):
    """What was logged of each step's losses."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
