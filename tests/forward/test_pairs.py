"""Masks of pairs: where sequences are packed in a row, and which masks a recurrence can't follow."""

import pytest
import torch
from generators import ERROR, generator
from helpers import CLOSE, adapted, padding_mask, token_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_read.forward.packing import read_pairs


LENGTHS = (5, 1, 3, 4)
LOWEST = torch.finfo(torch.float32).min
FORMS = {
    "bool": lambda seen: seen,
    "additive": lambda seen: torch.zeros(seen.shape).masked_fill(~seen, LOWEST),
    "infinite": lambda seen: torch.zeros(seen.shape).masked_fill(~seen, -torch.inf),
    "-10000": lambda seen: torch.zeros(seen.shape).masked_fill(~seen, -10000.0),
}


def blocks(lengths, *, causal=True, window=None, valid=None):
    """`(1, 1, time, time)`: tokens see those of their own sequence."""
    time = sum(lengths)
    seen = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    distance = torch.arange(time)[:, None] - torch.arange(time)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    if valid is not None:
        seen &= valid & valid[:, None]
    return seen[None, None]


def positions(lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("cell", "family"), [("gru", "llama"), ("lstm", "gpt2"), ("rnn", "qwen3"), ("gru", "opt")])
@torch.no_grad()
def test_causal_blocks(form, cell, family):
    """Neat packing: each sequence of a row is as alone, the base model's attention and READ's state alike."""
    model, rows = generator(family, cell), token_rows(LENGTHS)
    batch = {"input_ids": torch.cat(rows)[None], "use_cache": False, "position_ids": positions(LENGTHS)}
    packed = model(**batch, attention_mask=FORMS[form](blocks(LENGTHS))).logits[0]
    alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
    torch.testing.assert_close(packed, alone, **ERROR)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"cell": "lstm", "bidirectional": True}], ids=str)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_blocks_of_an_encoder(options, form):
    """In both directions as well, with padding inside of a block: two rows, cut in different places."""
    model, lengths = adapted("bert", **options), ((4, 1, 3), (2, 6))
    rows = [token_rows(row) for row in lengths]
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[0, 6] = valid[1, 2] = valid[1, 7] = False
    mask = torch.cat([blocks(row, causal=False, valid=keep) for row, keep in zip(lengths, valid, strict=True)])
    at = torch.cat([positions(row) for row in lengths])
    batch = {"input_ids": torch.stack([torch.cat(row) for row in rows]), "position_ids": at}
    packed = model(**batch, attention_mask=FORMS[form](mask)).last_hidden_state
    for row, (sizes, keep) in enumerate(zip(lengths, valid, strict=True)):
        for start, size in zip((sum(sizes[:i]) for i in range(len(sizes))), sizes, strict=True):
            cut = slice(start, start + size)
            one = {name: value[row : row + 1, cut] for name, value in batch.items()}
            alone = model(**one, attention_mask=keep[None, cut].long()).last_hidden_state[0]
            torch.testing.assert_close(packed[row, cut][keep[cut]], alone[keep[cut]], **CLOSE)


@torch.no_grad()
def test_padding_on_the_left_of_a_causal_mask():
    """A mask of pairs that is only causal and padded: rows as alone, nothing is packed."""
    model, rows = generator("llama"), token_rows((7, 4))
    valid = padding_mask((7, 4), "left", 7)
    ids = torch.full((2, 7), 7)
    ids[valid] = torch.cat(rows)
    mask = torch.cat([blocks((7,), valid=keep) for keep in valid])
    at = (valid.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=at, use_cache=False).logits
    for row, keep, tokens in zip(logits, valid, rows, strict=True):
        torch.testing.assert_close(row[keep], model(input_ids=tokens[None], use_cache=False).logits[0], **ERROR)


def tree():
    """A prefix that two continuations share."""
    seen = blocks((3, 2, 2))[0, 0]
    seen[3:, :3] = True
    return seen[None, None]


REFUSED = {
    "a shared prefix": tree(),
    "the last token alone": torch.eye(7).bool()[None, None] | blocks((7,)).roll(1, -1) & blocks((7,)),
    "every second token": blocks((7,)) & ((torch.arange(7)[:, None] - torch.arange(7)) % 2 == 0),
    "a look into the next sequence": blocks((4, 3)) | (torch.arange(7) == 5) & (torch.arange(7)[:, None] == 1),
    "heads that differ": torch.cat([blocks((7,)), blocks((4, 3)), blocks((7,)), blocks((7,))], dim=1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_recurrence_can_not_follow(name):
    """Refused with the forms that can be followed; without a recurrence it runs."""
    ids = torch.cat(token_rows((7,)))[None]
    with pytest.raises(ValueError, match=r"down_proj can't follow this attention mask.*block-diagonal.*cell='none'"):
        generator("llama")(input_ids=ids, attention_mask=REFUSED[name], use_cache=False)
    generator("llama", "none")(input_ids=ids, attention_mask=REFUSED[name], use_cache=False)


def test_a_causal_mask_under_a_recurrence_of_both_directions():
    """It would show each token its future; a full one is right."""
    model, ids = adapted("bert", bidirectional=True), torch.cat(token_rows((7,)))[None]
    with pytest.raises(ValueError, match="can't follow this attention mask"):
        model(input_ids=ids, attention_mask=blocks((7,)))
    model(input_ids=ids, attention_mask=blocks((7,), causal=False))


@torch.no_grad()
def test_drafts_as_a_tree_are_refused_with_a_cache():
    """Tokens beside each other, after tokens in a cache; in a line they are right."""
    from generators import CACHE

    model, ids = generator("llama"), torch.cat(token_rows((8,)))[None]
    whole = model(input_ids=ids, use_cache=False).logits[:, 5:]
    for name, own in (("line", blocks((3,))), ("tree", blocks((1, 1, 1)))):
        cache = getattr(model(input_ids=ids[:, :5], use_cache=True), CACHE)
        mask = torch.cat([torch.ones(1, 1, 3, 5).bool(), own], dim=-1)
        given = {"input_ids": ids[:, 5:], "attention_mask": mask, CACHE: cache}
        if name == "line":
            torch.testing.assert_close(model(**given).logits, whole, **ERROR)
        else:
            with pytest.raises(ValueError, match="can't follow this attention mask"):
                model(**given)


def slowly(seen):
    """Sequences and verdict of one row's mask by definition, token by token."""
    time = len(seen)
    valid = [bool(seen[i, i]) for i in range(time)]
    sequences, starts = [], [False] * time
    for i in range(time):
        if not valid[i]:
            continue
        if sequences and seen[i, sequences[-1][-1]]:
            sequences[-1].append(i)
        else:
            starts[i] = bool(sequences)
            sequences.append([i])
    reach = [max((i - j for j in range(i + 1) if seen[i, j]), default=0) if valid[i] else 0 for i in range(time)]
    ahead = [max((j - i for j in range(i, time) if seen[i, j]), default=0) if valid[i] else 0 for i in range(time)]
    window, window_ahead = max(reach, default=0), max(ahead, default=0)
    keeps, sees = True, True
    for sequence in sequences:
        last = next((min(s) - 1 for s in sequences if min(s) > max(sequence)), time - 1)
        for i in sequence:
            before = {j for j in range(i + 1) if seen[i, j]}
            after = {j for j in range(i + 1, time) if seen[i, j]}
            keeps &= before == {j for j in sequence if j <= i and i - j <= window}
            keeps &= all(valid[j] and j <= last for j in after)
            sees &= after == {j for j in sequence if j > i and j - i <= window_ahead}
    sees &= window_ahead > 0 or all(len(sequence) == 1 for sequence in sequences)
    return starts, keeps, sees


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_read_pairs(data):
    """Any mask of up to seven tokens is read as by definition."""
    time = data.draw(st.integers(2, 7))
    lengths, left = [], time
    while left:
        lengths.append(data.draw(st.integers(1, left)))
        left -= lengths[-1]
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=time, max_size=time)))
    window = data.draw(st.one_of(st.none(), st.integers(1, time)))
    seen = blocks(lengths, causal=data.draw(st.booleans()), window=window, valid=valid)[0, 0]
    for _ in range(data.draw(st.integers(0, 2))):  # and now and then one that is none of these
        i, j = (data.draw(st.integers(0, time - 1)) for _ in range(2))
        seen[i, j] = not seen[i, j]
    pairs = read_pairs(seen[None])
    starts, keeps, sees = slowly(seen)
    assert bool(pairs.keeps_order) == keeps
    if keeps:  # else nobody goes by them
        assert pairs.starts[0].tolist() == starts
        assert bool(pairs.sees_ahead) == sees


def test_rows_of_a_batch_are_read_each_by_itself():
    """What one row says changes no other."""
    masks = torch.cat([blocks((3, 4)), blocks((7,)), blocks((1, 2, 4))])[:, 0]
    pairs = read_pairs(masks)
    assert pairs.starts.long().tolist() == [[0, 0, 0, 1, 0, 0, 0], [0] * 7, [0, 1, 0, 1, 0, 0, 0]]
    assert bool(pairs.keeps_order)
