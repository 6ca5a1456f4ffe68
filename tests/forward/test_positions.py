"""Positions that begin again: READ separates sequences where the model's attention does, else it says so."""

import pytest
import torch
import transformers
from generators import DECODER, ERROR, generator
from helpers import strengthen, token_rows
from peft import get_peft_model

from peft_read import ReadConfig


LENGTHS = (5, 1, 3, 4)
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32}
QWEN = {
    "Qwen2VL": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
    "Qwen2_5_VL": VISION | {"intermediate_size": 32},
    "Qwen3VL": VISION | {"intermediate_size": 32},
}


def qwen(name, cell="gru"):
    """The family's model with adapters in its language tower."""
    torch.manual_seed(0)
    text = DECODER | {"rope_parameters": ROPE} | ({"head_dim": 8} if name == "Qwen3VL" else {})
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=QWEN[name])
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval().requires_grad_(False)
    return strengthen(get_peft_model(model, ReadConfig(r=4, cell=cell))).eval()


def packed():
    rows = token_rows(LENGTHS)
    at = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return rows, {"input_ids": torch.cat(rows)[None], "use_cache": False}, at


def alone(model, rows):
    return torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])


def goes_across(model, batch, at, rows):
    """Whether the base model's own attention mixes the sequences."""
    with model.disable_adapter():
        return (model(**batch, position_ids=at).logits[0] - alone(model, rows)).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("name", QWEN)
@torch.no_grad()
def test_four_rows(name, cell, attention):
    """The text's own positions and those of time, height and width: as alone."""
    model, (rows, batch, at) = qwen(name, cell), packed()
    model.get_base_model().set_attn_implementation(attention)
    logits = model(**batch, position_ids=at.expand(4, 1, -1)).logits[0]
    torch.testing.assert_close(logits, alone(model, rows), rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", QWEN)
@torch.no_grad()
def test_three_rows(name):
    """Told apart by a mask or by the caller they are as alone; where the base model mixes them it is said."""
    model, (rows, batch, at) = qwen(name), packed()
    three = at.expand(3, 1, -1)
    mask = torch.block_diag(*(torch.ones(n, n) for n in LENGTHS)).bool().tril()[None, None]
    logits = model(**batch, position_ids=three, attention_mask=mask).logits[0]
    torch.testing.assert_close(logits, alone(model, rows), rtol=0, atol=5e-5)
    assert goes_across(model, batch, three, rows)
    with pytest.raises(ValueError, match=r"`position_ids` that begin again.*four rows.*describe_tokens"):
        model(**batch, position_ids=three)


@pytest.mark.parametrize("name", QWEN)
@torch.no_grad()
def test_two_dimensions_of_a_family_that_wants_rows(name):
    """As the base model does with them: apart, or refused."""
    model, (rows, batch, at) = qwen(name), packed()
    if goes_across(model, batch, at, rows):
        with pytest.raises(ValueError, match="`position_ids` that begin again"):
            model(**batch, position_ids=at)
    else:
        logits = model(**batch, position_ids=at).logits[0]
        torch.testing.assert_close(logits, alone(model, rows), rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", QWEN)
@torch.no_grad()
def test_positions_of_pictures_begin_nothing(name):
    """Rows of height and width start over within a picture: still one sequence, as with no positions told apart."""
    model, (_, batch, _) = qwen(name), packed()
    time = torch.tensor([0, 1, 2, 3, 3, 3, 8, 8, 8, 6, 7, 8, 9])  # a video's may go on beyond those after it
    height = torch.tensor([0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 9])
    width = torch.tensor([0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9])
    at = torch.stack([time, height, width])[:, None]
    logits = model(**batch, position_ids=at).logits
    mask = torch.ones_like(batch["input_ids"])
    torch.testing.assert_close(logits, model(**batch, position_ids=at, attention_mask=mask).logits, **ERROR)


@torch.no_grad()
def test_a_model_that_goes_across():
    """A cache keeps transformers from separating sequences, and OPT never does: both are said."""
    rows, batch, at = packed()
    with pytest.raises(ValueError, match=r"attention goes across them.*use_cache=False"):
        generator("llama")(**batch | {"use_cache": True}, position_ids=at)
    assert goes_across(generator("opt"), batch, at, rows)
    with pytest.raises(ValueError, match="attention goes across them"):
        generator("opt")(**batch, position_ids=at)
