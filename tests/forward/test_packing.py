"""Several sequences packed into one row are as separate ones: no state leaks from one into the next."""

import pytest
import torch
from generators import CACHE, DECODERS, ERROR, VISIBLE, generator
from helpers import adapted, adapter_parameters, token_rows
from transformers import DataCollatorWithFlattening

from peft_read import describe_tokens
from peft_read.forward.call import ForwardCall, RunningForward
from peft_read.forward.packing import starts_of


LENGTHS = (5, 1, 3, 4)
# Two rows of as many tokens, cut in different places.
TWO_ROWS = ((4, 1, 3), (2, 6))
# OPT's own attention goes across the sequences of a row.
PACKED = [family for family in DECODERS if family not in ("llava", "opt")]
CELLS = [("gru", family) for family in PACKED] + [("rnn", "llama"), ("lstm", "llama"), ("lstm", "gpt2")]
EVERY_MODEL = pytest.mark.parametrize(("cell", "family"), CELLS)


def positions(lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


def packed(lengths=LENGTHS):
    """One row, as collators without padding make it."""
    rows = token_rows(lengths)
    return rows, {"input_ids": torch.cat(rows)[None], "position_ids": positions(lengths), "use_cache": False}


def alone(model, rows):
    return torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])


@EVERY_MODEL
@torch.no_grad()
def test_one_row(family, cell):
    """Told by positions that begin again, which transformers' attention goes by as well."""
    model = generator(family, cell)
    rows, batch = packed()
    torch.testing.assert_close(model(**batch).logits[0], alone(model, rows), **ERROR)


@EVERY_MODEL
@torch.no_grad()
def test_several_rows(family, cell):
    """Each row is cut in its own places."""
    model = generator(family, cell)
    parts = [packed(lengths) for lengths in TWO_ROWS]
    batch = {name: torch.cat([part[1][name] for part in parts]) for name in ("input_ids", "position_ids")}
    logits = model(**batch, use_cache=False).logits
    for row, (rows, _) in zip(logits, parts, strict=True):
        torch.testing.assert_close(row, alone(model, rows), **ERROR)


@pytest.mark.parametrize("family", PACKED)
@torch.no_grad()
def test_a_leak_would_show(family, monkeypatch):
    """With one state for the whole row the tests above fail by far."""
    model = generator(family)
    rows, batch = packed()
    monkeypatch.setattr("peft_read.read.layer.starts_of", lambda *_, **__: None)
    error = (model(**batch).logits[0] - alone(model, rows)).abs().amax(-1)
    assert error[: LENGTHS[0]].max() < 1e-5
    assert error[LENGTHS[0] :].min() > VISIBLE


@EVERY_MODEL
def test_gradients(family, cell):
    """Those of a packed row are the sum of its sequences' own."""
    model = generator(family, cell)
    rows, batch = packed()
    probe = torch.randn(sum(LENGTHS), 1, generator=torch.Generator().manual_seed(0))

    def gradients(logits):
        model.zero_grad()
        (logits.log_softmax(-1)[:, 5:6] * probe).sum().backward()
        return {name: p.grad.clone() for name, p in adapter_parameters(model).items()}

    actual, expected = gradients(model(**batch).logits[0]), gradients(alone(model, rows))
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("lengths_too", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_transformers_collator(family, lengths_too):
    """What Trainers make without padding, with the lengths for flash attention or without."""
    model, rows = generator(family), token_rows(LENGTHS)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=lengths_too)
    batch = collator([{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows])
    output = model(**batch, use_cache=False)
    torch.testing.assert_close(output.logits[0], alone(model, rows), **ERROR)
    starts = [sum(LENGTHS[:i]) for i in range(1, len(LENGTHS))]
    assert batch["labels"][0, starts].eq(-100).all()


def starts(**arguments):
    """Where the second and later sequences of a row of six tokens begin."""
    ids = torch.zeros(1, 6, dtype=torch.long)
    call = ForwardCall.of(torch.nn.Identity(), {"input_ids": ids} | arguments, causal=True)
    found = starts_of(RunningForward.of(call), (1, 6), "a module", None, both_ways=False)
    return None if found is None else found[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([0, 1, 2, 0, 1, 2], [3]),
        ([0, 0, 1, 2, 3, 4], [1]),
        ([0, 1, 5, 6, 7, 8], [2]),
        ([3, 4, 5, 6, 7, 8], None),
        ([0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5]),
    ],
)
def test_where_a_row_is_cut(given, expected):
    """Wherever positions don't rise by one, as transformers does; a row may begin at any."""
    assert starts(position_ids=torch.tensor([given])) == expected


def test_of_four_rows_the_text_s_own_tell():
    """Qwen-VL's positions of time, height and width follow, which may begin again elsewhere."""
    others = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 4, 5], [0, 0, 1, 1, 4, 5]])
    given = torch.cat([torch.tensor([[0, 1, 2, 0, 1, 2]]), others])[:, None]
    assert starts(position_ids=given) == [3]


def test_where_lengths_are_given():
    """They count, whatever else is there."""
    cut = torch.tensor([0, 2, 6], dtype=torch.int32)
    assert starts(cu_seq_lens_q=cut, position_ids=torch.arange(6)[None]) == [2]
    assert starts(cu_seq_lens_q=cut) == [2]


def test_lengths_of_other_tokens_are_refused():
    """They have to cover the batch."""
    model, (_, batch) = generator("llama"), packed()
    with pytest.raises(ValueError, match="packed sequences of 9 tokens in a batch of 13"):
        model(**batch, cu_seq_lens_q=torch.tensor([0, 4, 9], dtype=torch.int32))


@torch.no_grad()
def test_positions_of_an_encoder_cut_nothing():
    """Attention in both directions goes across; equal positions are no beginning there."""
    model = adapted("bert", cell="gru")
    ids = token_rows((6, 6))
    ids = torch.stack(ids)
    together = model(input_ids=ids, position_ids=torch.zeros_like(ids)).last_hidden_state
    cut = model(input_ids=ids, position_ids=positions((3, 3)).expand(2, -1)).last_hidden_state
    other = ids.clone()
    other[:, 0] = 8
    for given, states in ((torch.zeros_like(ids), together), (positions((3, 3)).expand(2, -1), cut)):
        changed = model(input_ids=other, position_ids=given).last_hidden_state
        assert (changed - states)[:, 3:].abs().amax(-1).min() > VISIBLE


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_with_a_mask_or_a_cache_a_row_is_one_sequence(family):
    """There transformers' attention doesn't separate sequences either; READ's state goes on with it."""
    model = generator(family)
    _, batch = packed()
    ids, given = batch["input_ids"], batch["position_ids"]
    masked = model(input_ids=ids, position_ids=given, attention_mask=torch.ones_like(ids), use_cache=False).logits
    with torch.no_grad():
        first = model(input_ids=ids[:, :7], position_ids=given[:, :7], attention_mask=torch.ones(1, 7), use_cache=True)
        second = model(
            input_ids=ids[:, 7:], position_ids=given[:, 7:], **{CACHE: getattr(first, CACHE)}, use_cache=True
        )
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), masked, **ERROR)


def test_a_packed_row_with_an_adapter_per_sample_is_refused():
    """Names are for rows, of which there is one."""
    model, (_, batch) = generator("llama"), packed()
    with pytest.raises(ValueError, match="one adapter per sample"):
        model(**batch, adapter_names=["default"] * len(LENGTHS))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_lengths_that_the_attention_does_not_see(attention):
    """Without positions or a mask it goes across; refused with what separates the sequences."""
    model, (_, batch) = generator("llama"), packed()
    model.get_base_model().set_attn_implementation(attention)
    lengths = torch.tensor([0, 5, 6, 9, 13], dtype=torch.int32)
    del batch["position_ids"]
    with pytest.raises(ValueError, match=r"`cu_seq_lens_q`.*attention goes across.*`position_ids`, use_cache=False"):
        model(**batch, cu_seq_lens_q=lengths)
    whole = model(**batch).logits
    torch.testing.assert_close(model(**batch, cu_seq_lens_q=lengths[[0, -1]]).logits, whole, **ERROR)


@torch.no_grad()
def test_positions_with_a_gap():
    """They go on in one sequence where a cache is filled, as transformers' attention does then."""
    model, ids = generator("llama"), torch.cat(token_rows((7,)))[None]
    gap = torch.tensor([[0, 1, 2, 10, 11, 12, 13]])
    given = {"input_ids": ids, "position_ids": gap}
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    explicit = model(**given, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(model(**given, use_cache=True).logits, explicit, **ERROR)


@torch.no_grad()
def test_packed_sequences_behind_a_cache_are_refused():
    """Only the first of them could go on from its tokens."""
    model, ids = generator("llama"), torch.cat(token_rows((9,)))[None]
    cache = getattr(model(input_ids=ids[:, :4], use_cache=True), CACHE)
    given = {"input_ids": ids[:, 4:], CACHE: cache}
    with pytest.raises(ValueError, match="packed in a row, and given a cache"):
        model(**given, cu_seq_lens_q=torch.tensor([0, 2, 5], dtype=torch.int32))
    sequences = torch.tensor([[0, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match="packed in a row"), describe_tokens(sequence_ids=sequences):
        model(**given)
