"""Which tokens are padding is read off a mask in every form that occurs; what fits nothing is refused."""

import pytest
import torch
from helpers import CLOSE, EXACT, adapted, batch_of, result
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertModel

from peft_read.forward.padding import valid_tokens


BATCH, TIME = 3, 5
VALID = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0]]).bool()
SHAPE = (BATCH, TIME)
LOWEST = torch.finfo(torch.float32).min


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, LOWEST)


def pairs(keys, past=0, causal=True):
    """`(batch, 1, time, keys)`: which keys each of the last queries may look at."""
    queries, all_keys = past + torch.arange(TIME)[:, None], torch.arange(keys.shape[1])
    seen = (all_keys <= queries) if causal else torch.ones(TIME, keys.shape[1], dtype=torch.bool)
    return (seen & keys[:, None, :])[:, None]


def read(mask, past=0, additive=False):
    return valid_tokens(mask, SHAPE, past, additive=additive)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32, torch.bfloat16])
def test_two_dimensions(dtype):
    """One for valid, zero for padding, as tokenizers give it."""
    assert torch.equal(read(VALID.to(dtype)), VALID)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_dimensions_additive(dtype):
    """Inside some encoders zero is valid and negative is padding; positive is more than valid (Longformer)."""
    mask = torch.where(VALID, 0.0, -10000.0).to(dtype)
    mask[0, 0] = 10000
    assert torch.equal(read(mask, additive=True), VALID)
    assert torch.equal(read(VALID, additive=True), VALID)
    assert torch.equal(read(VALID.long(), additive=True), VALID)


def test_additive_masks_given_by_a_user_are_refused():
    """There a zero would mean padding: all of it would be taken the wrong way round."""
    assert read(additive(VALID)) is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", [lambda m: m, additive, lambda m: additive(m).bfloat16(), lambda m: m.long()])
def test_four_dimensions(causal, form):
    """A token is valid if it may look at itself."""
    assert torch.equal(read(form(pairs(VALID, causal=causal))), VALID)


@pytest.mark.parametrize("hidden", [-1e4, -9000.0, -1001.0, -torch.inf])
def test_how_much_hides(hidden):
    """Numbers so low, in two dimensions and in four; a bias of the attention, such as ALiBi's, hides nothing."""
    assert torch.equal(read(torch.where(VALID, 0.0, hidden), additive=True), VALID)
    assert torch.equal(read(torch.where(pairs(VALID), -100.0, hidden)), VALID)


@pytest.mark.parametrize("form", [lambda m: m, additive, lambda m: m.long()])
def test_one_query_for_all(form):
    """The keys of all queries in one, as some models broadcast them: one row, or the batch's."""
    assert torch.equal(read(form(VALID[:, None, None])), VALID)
    assert torch.equal(read(form(VALID[1:2, None, None])), VALID[1:2].expand(BATCH, -1))


def test_zeros_alone_may_mean_either():
    """As a mask to be added nothing is padding, as one of ones all is: it's no answer."""
    assert read(torch.zeros(BATCH, TIME)) is None
    assert read(torch.zeros(BATCH, TIME), additive=True).all()
    assert not read(torch.zeros(BATCH, TIME, dtype=torch.long)).any()


def test_four_dimensions_of_one_row():
    """One for all rows of the batch."""
    assert torch.equal(read(pairs(VALID[1:2])), VALID[1:2].expand(BATCH, -1))


@pytest.mark.parametrize("past", [1, 4])
def test_tokens_in_a_cache(past):
    """The mask covers them as well; only the new ones count."""
    keys = torch.cat([torch.ones(BATCH, past, dtype=torch.bool), VALID], dim=1)
    assert torch.equal(read(keys, past), VALID)
    assert torch.equal(read(pairs(keys, past), past), VALID)
    assert torch.equal(read(VALID, past), VALID)


@given(past=st.integers(0, 6), room=st.integers(0, 4))
def test_caches_of_fixed_size(past, room):
    """Keys for which there is room only lie behind the new tokens, whatever the mask says of them."""
    keys = torch.cat([torch.ones(BATCH, past), VALID, torch.ones(BATCH, room)], dim=1).bool()
    for mask in (keys, pairs(keys, past), additive(pairs(keys, past))):
        assert torch.equal(read(mask, torch.tensor(past)), VALID)


def test_full_windows_of_fixed_size():
    """Once a sliding window is full its last keys are the new tokens, however many came before."""
    window = torch.cat([torch.zeros(BATCH, 2, dtype=torch.bool), VALID], dim=1)
    for past in (2, 3, 7, 100):
        assert torch.equal(read(pairs(window, past=2), torch.tensor(past)), VALID)


@pytest.mark.parametrize("kinds", [("full_attention", "sliding_attention"), ("sliding_attention", "full_attention")])
def test_dicts_by_kind_of_layer(kinds):
    """Full attention's mask counts, else any that is there."""
    other = torch.ones(BATCH, 1, TIME, TIME, dtype=torch.bool)
    masks = {kind: pairs(VALID) if kind == "full_attention" else other for kind in kinds}
    assert torch.equal(read(masks), VALID)
    assert torch.equal(read({"full_attention": None, "sliding_attention": pairs(VALID)}), VALID)


def test_patches_of_images():
    """`(batch, rows, columns)`, in the order in which they are tokens."""
    mask = torch.tensor([[[1, 1, 0], [1, 1, 0]], [[1, 1, 1], [0, 0, 0]]]).bool()
    assert torch.equal(valid_tokens(mask, (2, 6), 0, additive=False), mask.flatten(1))


@pytest.mark.parametrize(
    "mask",
    [
        None,
        {},
        {"full_attention": None},
        "flex",
        torch.ones(BATCH),
        torch.ones(BATCH, TIME - 1),
        torch.ones(BATCH, TIME + 1),
        torch.ones(BATCH + 1, TIME),
        torch.ones(BATCH, TIME, TIME).bool(),
        torch.ones(BATCH, 1, TIME, TIME - 1).bool(),
        torch.ones(BATCH - 1, 1, TIME, TIME).bool(),
        torch.ones(BATCH, 2, 3, 4).bool(),
    ],
    ids=lambda mask: str(tuple(mask.shape)) if isinstance(mask, torch.Tensor) else str(mask),
)
def test_what_is_no_mask_for_these_tokens(mask):
    """None, for the caller to look elsewhere or refuse."""
    assert read(mask) is None


LEFT = batch_of("bert", padding="left")
SQUARE = LEFT["attention_mask"].bool()[:, None, None, :].expand(-1, 1, 10, -1)


def test_a_mask_of_pairs_given_to_a_model():
    """A token that nobody may look at, itself included, is padding as in the mask of tokens."""
    model = adapted("bert", cell="gru")
    valid = LEFT["attention_mask"].bool()
    with torch.no_grad():
        states = model(**LEFT | {"attention_mask": SQUARE}).last_hidden_state[valid].flatten()
    torch.testing.assert_close(states, result("bert", model, LEFT), **CLOSE)


def test_an_additive_mask_given_to_a_model():
    """A model that takes the numbers for truth values, the wrong way round, is followed in that."""
    model, mask = adapted("bert", cell="gru"), (1.0 - LEFT["attention_mask"].float()) * -1e4
    with torch.no_grad():
        actual, expected = (model(**LEFT | {"attention_mask": m}).last_hidden_state for m in (mask, mask != 0))
    torch.testing.assert_close(actual, expected, **EXACT)


def test_a_mask_of_three_dimensions_is_refused():
    """The error says what was given and what to give."""
    with pytest.raises(ValueError, match=r"attention mask of shape \(3, 10, 10\).*\(batch, time\)"):
        adapted("bert", cell="gru")(**LEFT | {"attention_mask": torch.ones(3, 10, 10)})


def test_a_mask_of_another_length_is_refused():
    """The error says both shapes."""

    class Doubling(BertModel):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(torch.cat([input_ids, input_ids], 1))

    model = adapted("bert", cell="gru")
    model.get_base_model().__class__ = Doubling
    with pytest.raises(ValueError, match=r"shape \(3, 10\).*\(batch, time\) = \(3, 20\)"):
        model(input_ids=LEFT["input_ids"], attention_mask=LEFT["attention_mask"])


def test_a_mask_of_ones_is_no_mask():
    """Nothing is padded: bit for bit the result without one."""
    model, batch = adapted("bert", cell="gru"), batch_of("bert", lengths=(6, 6))
    plain = {k: v[:, :6] for k, v in batch.items()}
    without = {k: v for k, v in plain.items() if k != "attention_mask"}
    with torch.no_grad():
        actual, expected = model(**plain).last_hidden_state, model(**without).last_hidden_state
    torch.testing.assert_close(actual, expected, **EXACT)
