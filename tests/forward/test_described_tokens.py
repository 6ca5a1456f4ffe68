"""What a caller says of the tokens takes the place of what is read off the arguments."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from generators import CACHE
from helpers import CLOSE, EXACT, adapted, batch_of, enable_checkpointing, strengthen, token_rows
from peft import get_peft_model
from torch import nn

from peft_read import ReadConfig, describe_tokens
from peft_read.forward.description import descriptions


WIDTH = 16


class Block(nn.Module):
    """Attention and a feed-forward part, in the manner of Moment-DETR, batch first."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.linear1, self.linear2 = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x, hidden):
        x = self.norms[0](x + self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0])
        return self.norms[1](x + self.linear2(torch.relu(self.linear1(x))))


class Grounding(nn.Module):
    """Video and text run as one sequence; the masks have names of their own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, src_vid, src_vid_mask, src_txt, src_txt_mask):
        x, valid = torch.cat([src_vid, src_txt], 1), torch.cat([src_vid_mask, src_txt_mask], 1)
        for layer in self.layers:
            x = layer(x, valid == 0)
        return x[:, : src_vid.shape[1]]


def grounding(**options):
    torch.manual_seed(0)
    return strengthen(get_peft_model(Grounding(), ReadConfig(r=4, target_modules=["linear2"], **options))).eval()


def padded_pair():
    generator = torch.Generator().manual_seed(1)
    video, text = (torch.randn(2, n, WIDTH, generator=generator) for n in (7, 4))
    video_mask, text_mask = torch.ones(2, 7), torch.ones(2, 4)
    video_mask[1, :2] = 0
    text_mask[1, 2:] = 0
    return {"src_vid": video, "src_vid_mask": video_mask, "src_txt": text, "src_txt_mask": text_mask}


@pytest.mark.parametrize("options", [{"cell": "gru"}, {"cell": "lstm", "bidirectional": True}], ids=str)
@torch.no_grad()
def test_masks_of_ones_own_names(options):
    """A padded video and its padded text are as alone, when the caller says which tokens are valid."""
    model, batch = grounding(**options), padded_pair()
    valid = torch.cat([batch["src_vid_mask"], batch["src_txt_mask"]], dim=1)
    with describe_tokens(valid):
        together = model(**batch)
    short = {name: value[1:, 2:] if "vid" in name else value[1:, :2] for name, value in batch.items()}
    with describe_tokens():
        alone = model(**short)
    torch.testing.assert_close(together[1:, 2:], alone, **CLOSE)
    with pytest.warns(UserWarning, match="src_vid_mask"):
        unsaid = model(**batch)
    assert (unsaid[1:, 2:] - alone).abs().max() > 1e-2


def test_a_warning_once_for_each_model():
    """A mask of which nothing is read is told, once; not where the caller has spoken, nor without a recurrence."""
    model, batch = grounding(cell="gru"), padded_pair()
    with describe_tokens(torch.ones(2, 11)):
        model(**batch)
    with pytest.warns(UserWarning, match=r"given src_vid_mask, src_txt_mask, which READ.*attention_mask.*describe"):
        model(**batch)
    model(**batch)  # warnings are errors here
    grounding(cell="none")(**batch)
    with pytest.warns(UserWarning, match="src_vid_mask"):
        grounding(cell="gru")(**batch)


def test_no_warning_where_masks_are_read():
    """torch's own layers are given the padding by names that are read."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x, video_mask):
            return self.encoder(x, src_key_padding_mask=video_mask == 0)

    model = get_peft_model(Encoder(), ReadConfig(r=4, target_modules=["linear2"]))
    batch = padded_pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(batch["src_vid"], batch["src_vid_mask"])


@torch.no_grad()
def test_it_counts_more_than_the_arguments():
    """Of transformers' models as well, in calls and direct forwards; afterwards the arguments count again."""
    model, batch = adapted("bert", cell="gru"), batch_of("bert", padding="left")
    expected = model(**batch).last_hidden_state
    valid = batch["attention_mask"].bool()
    with describe_tokens(batch["attention_mask"]):
        said = model(**batch).last_hidden_state
    torch.testing.assert_close(said, expected, **EXACT)
    with describe_tokens():
        ignored = model(**batch).last_hidden_state
    assert (ignored[1] - expected[1])[valid[1]].abs().max() > 1e-3
    torch.testing.assert_close(model(**batch).last_hidden_state, expected, **EXACT)


def test_checkpoints_remember_it():
    """Blocks are computed again in the backward pass, where the context has ended."""
    gradients = []
    for checkpoints in (False, True):
        model, batch = adapted("bert", cell="gru").train(), batch_of("bert", padding="left")
        mask = batch.pop("attention_mask")
        if checkpoints:
            enable_checkpointing(model)
        with describe_tokens(mask):
            output = model(**batch).last_hidden_state
        output[mask.bool()][:, :3].sum().backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "read_" in name])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_sequences():
    """Several in a row, where the model's own attention is told apart by whatever it takes."""
    model, rows = adapted("llama", cell="gru"), token_rows((5, 3))
    ids = torch.cat(rows)[None]
    mask = torch.block_diag(*(torch.ones(n, n) for n in (5, 3))).bool().tril()[None, None]
    positions = torch.cat([torch.arange(n) for n in (5, 3)])[None]
    with describe_tokens(sequence_ids=torch.tensor([[4] * 5 + [2] * 3])):
        packed = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
    alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
    torch.testing.assert_close(packed, alone, **CLOSE)


@torch.no_grad()
def test_parts_of_a_model():
    """Each with tokens of its own; the innermost context that is about a module counts."""
    model, batch = adapted("t5", cell="gru"), batch_of("t5", padding="left")
    expected = model(**batch)
    wrong = torch.ones_like(batch["attention_mask"])
    with (
        describe_tokens(wrong),
        describe_tokens(batch["attention_mask"], module="encoder"),
        describe_tokens(batch["decoder_attention_mask"], module="decoder.block"),
    ):
        said = model(**batch)
    torch.testing.assert_close(said.last_hidden_state, expected.last_hidden_state, **EXACT)
    torch.testing.assert_close(said.encoder_last_hidden_state, expected.encoder_last_hidden_state, **EXACT)


@pytest.mark.parametrize("name", ["base_model.model.encoder", "base_model.model.encoder.", "encoder."])
@torch.no_grad()
def test_names_as_peft_gives_them(name):
    """With the prefix of the adapted model, or a dot behind."""
    model, batch = adapted("bert", cell="gru"), batch_of("bert", padding="left")
    mask = batch.pop("attention_mask")
    with describe_tokens(mask):
        expected = model(**batch).last_hidden_state
    with describe_tokens(mask, module=name):
        said = model(**batch).last_hidden_state
    torch.testing.assert_close(said, expected, **EXACT)
    assert (model(**batch).last_hidden_state - expected).abs().max() > 1e-3


@torch.no_grad()
def test_a_name_of_nothing():
    """Said at the end, with names that are there; not if no adapter ran, nor over an error that came before."""
    model, batch = grounding(cell="gru"), padded_pair()
    with (
        pytest.warns(UserWarning, match="src_vid_mask"),  # what is about nothing isn't about these tokens
        pytest.raises(ValueError, match=r"module='blocks'.*such as layers\.0\.linear2, layers\.1\.linear2\."),
        describe_tokens(torch.ones(2, 11), module="blocks"),
    ):
        model(**batch)
    with describe_tokens(module="blocks"), model.disable_adapter():
        model(**batch)
    with pytest.raises(ZeroDivisionError), describe_tokens(module="blocks"):
        1 / 0  # noqa: B018


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"valid": torch.ones(3)}, r"`valid` must be of shape \(batch, time\), got \(3,\)"),
        ({"sequence_ids": torch.ones(2, 3, 4).long()}, r"`sequence_ids` must be of shape"),
        ({"valid": torch.ones(2, 3), "sequence_ids": torch.ones(2, 4).long()}, r"\(2, 3\) and \(2, 4\)"),
        ({"sequence_ids": torch.ones(2, 3)}, "must be integers, got torch.float32"),
    ],
)
def test_what_is_no_description(given, message):
    """Said when it is said."""
    with pytest.raises(ValueError, match=message), describe_tokens(**given):
        pass


@pytest.mark.parametrize("name", ["valid", "sequence_ids"])
def test_a_description_of_other_tokens(name):
    """Said in the forward, with both shapes and the module."""
    model, batch = adapted("bert", cell="gru"), batch_of("bert", padding="left")
    given = {name: torch.ones(3, 4, dtype=torch.long)}
    message = rf"`{name}` of shape \(3, 4\), but encoder.*\(3, 10\)"
    with describe_tokens(**given), pytest.raises(ValueError, match=message):
        model(**batch)


def test_sequences_behind_a_cache():
    """Only the first of them could go on from it."""
    model, ids = adapted("llama", cell="gru"), token_rows((8,))[0][None]
    first = model(input_ids=ids[:, :3], use_cache=True)
    rest = {"input_ids": ids[:, 3:], CACHE: getattr(first, CACHE)}
    message = "several sequences are packed in a row, and given a cache"
    with describe_tokens(sequence_ids=torch.tensor([[0, 0, 1, 1, 1]])), pytest.raises(ValueError, match=message):
        model(**rest)
    with pytest.raises(ValueError, match=message):
        model(**rest, cu_seq_lens_q=torch.tensor([0, 2, 5], dtype=torch.int32))


def test_replicas_are_out_of_reach():
    """nn.DataParallel runs them in other threads, each with a part of the batch."""
    model, batch = adapted("bert", cell="gru"), batch_of("bert", padding="left")
    model.get_base_model()._is_replica = True  # as torch marks them

    def run():
        return model(**batch)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()
        with describe_tokens(), pytest.raises(RuntimeError, match=r"replicas of nn\.DataParallel.*accelerate launch"):
            pool.submit(run).result()


def test_threads_and_errors():
    """A description is for its own thread, and ends with its context, whatever ended it."""
    seen = []

    def fail_inside():
        with describe_tokens():
            seen.append(len(descriptions()))
            with ThreadPoolExecutor(1) as pool:
                seen.append(len(pool.submit(descriptions).result()))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert [*seen, len(descriptions())] == [1, 0, 0]
