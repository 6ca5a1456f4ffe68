"""What the tests feed tiny models with and read off them, and adapters in which errors can't hide."""

import math

import peft
import pytest
import torch
import transformers
from models import FAMILIES, IMAGE, VOCAB, base_model
from packaging.version import parse
from peft import get_peft_model
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_read import ReadConfig


# transformers' own `add_adapter`, and whatever goes on from it, may ask for a PEFT that isn't released yet.
ADD_ADAPTER = pytest.mark.skipif(
    parse(peft.__version__) < parse(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__}'s add_adapter demands PEFT {MIN_PEFT_VERSION}",
)
# Lengths of the rows of the padded batch.
LENGTHS = (8, 5, 1)
EXACT = {"rtol": 0, "atol": 0}
# Of a tensor whose entries are around 1; a state that is wrong shows at 0.01 and above.
CLOSE = {"rtol": 0, "atol": 2e-5}


def padding_mask(lengths, padding, time):
    """`(batch, time)` bool: each row's valid places, with the padding on the left, on the right, or in holes."""
    mask = torch.zeros(len(lengths), time, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for row, length in zip(mask, lengths, strict=True):
        places = {
            "right": torch.arange(length),
            "left": torch.arange(time - length, time),
            "holes": torch.randperm(time, generator=generator)[:length],
        }
        row[places[padding]] = True
    return mask


def token_rows(lengths=LENGTHS):
    """Random token ids, a row of each length, none of them special."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB - 1, (length,), generator=generator) for length in lengths]


def images(batch):
    return torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2))


def text_batch(family, rows, mask=None):
    """The rows as a model's inputs, at the mask's true places; without a mask the rows are of one length."""
    known = FAMILIES[family]
    valid = torch.ones(len(rows), len(rows[0]), dtype=torch.bool) if mask is None else mask
    # Padding holds a token like any other: only the mask tells.
    ids = torch.full(valid.shape, 7)
    for row, places, tokens in zip(ids, valid, rows, strict=True):
        row[places] = tokens
    batch = {"input_ids": ids, "attention_mask": valid.long()}
    if known.positions:
        batch["position_ids"] = (valid.cumsum(1) - 1).clamp(min=0)
    if known.encoder_decoder:
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": valid.long()}
    if known.images:
        batch["pixel_values"] = images(len(rows))
    return batch


def batch_of(family, *, padding="right", lengths=LENGTHS):
    """A batch for a family: padded text, images, or both."""
    if not FAMILIES[family].text:
        return {"pixel_values": images(len(lengths))}
    return text_batch(family, token_rows(lengths), padding_mask(lengths, padding, max(lengths) + 2))


def states(family, model, batch):
    """What the model gives for each token, by the kind of token: `(batch, time, features)` each."""
    output = model(**batch)
    return {kind: part(output) for kind, part in FAMILIES[family].parts.items()}


def valid_states(family, model, batch):
    """`states`, in one row, of the tokens that aren't padding."""
    mask = batch.get("attention_mask")
    parts = states(family, model, batch)
    return torch.cat([(p if kind == "image" else p[mask.bool()]).flatten() for kind, p in parts.items()])


@torch.no_grad()
def result(family, model, batch):
    """`valid_states` outside training, where equal weights give equal bits."""
    return valid_states(family, model, batch)


def loss_of(family, model, batch):
    """A scalar that depends on every valid token, on each feature by another weight."""
    flat = valid_states(family, model, batch)
    return (flat * torch.randn(flat.shape, generator=torch.Generator().manual_seed(3))).mean()


def adapter_parameters(model, adapter_name="default"):
    """READ's parameters of one adapter by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".read_" in name and f".{adapter_name}." in name
    }


def recurrent_width(model, bias_name):
    return model.get_submodule(bias_name.rpartition(".")[0]).hidden_size


@torch.no_grad()
def strengthen(model, seed=0, adapter_name="default"):
    """Give an adapter weights under which a wrong state shows: it remembers for long and acts on the output.

    Small inputs keep the cells out of saturation, recurrent matrices are orthogonal, gates mostly keep their
    state, and the upward projection is far from zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter_parameters(model, adapter_name).items():
        values = torch.randn(parameter.shape, generator=generator)
        if "weight_hh" in name:
            size = parameter.shape[1]
            blocks = [torch.linalg.qr(block)[0] * 0.95 for block in values.split(size)]
            values = torch.cat(blocks)
        elif "bias" in name and "read_recurrence" in name:
            values = values * 0.1
            gates = len(values) // recurrent_width(model, name)
            if gates > 1:  # the second gate keeps the state: a GRU's update gate, an LSTM's forget gate
                values.view(gates, -1)[1] += 1.0
        elif "weight_ih" in name:
            values = values * 0.5 / math.sqrt(parameter.shape[1])
        elif "read_downward" in name:
            values = values / math.sqrt(parameter.shape[-1])
        else:
            values = values * 0.3
        parameter.copy_(values)
    return model


def enable_checkpointing(model, use_reentrant=False):
    """Let the model's own blocks be computed again in the backward pass."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    options = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
    # A reentrant checkpoint makes gradients only if its input has some; PEFT's Trainers do this as well.
    model.enable_input_require_grads()


def hide_masks(monkeypatch):
    """Keep every mask from the adapters, as a control: a test of padding has to see that."""
    monkeypatch.setattr("peft_read.read.layer.padding_of", lambda *_: None)


def adapted(family, seed=0, **options):
    """The family's model with a strong adapter, in eval mode."""
    return strengthen(get_peft_model(base_model(family), ReadConfig(**{"r": 4} | options)), seed).eval()
