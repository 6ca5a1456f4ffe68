"""What a layer knows of the running forward: calls, threads, copies and errors don't get in each other's way."""

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import CLOSE, EXACT, adapted, batch_of, padding_mask, result, states, text_batch, token_rows
from models import WIDTH, base_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_read import describe_tokens
from peft_read.forward.call import ForwardCall, RunningForward, SameObjects
from peft_read.read import layer as read_layer
from peft_read.read.layer import ReadLayer


LEFT = batch_of("bert", padding="left")


def contexts(model):
    return {id(module.context) for module in model.modules() if isinstance(module, ReadLayer)}


def nothing_runs(model):
    return all(m.context.running() is None for m in model.modules() if isinstance(m, ReadLayer))


def test_each_owner_has_one_context():
    """Encoder and decoder are given masks of their own; the layers of each share one context."""
    for family, owners in [("bert", 1), ("llama", 1), ("bart", 2), ("t5", 2), ("clip", 2)]:
        assert len(contexts(adapted(family))) == owners


def test_encoder_and_decoder_masks_are_not_mixed_up():
    """Also where both sides have the same length but other padding."""
    model, rows = adapted("t5", cell="gru"), token_rows((6, 6))
    other = token_rows((3, 4))
    left, right = padding_mask((6, 6), "left", 8), padding_mask((3, 4), "right", 8)
    source, target = text_batch("t5", rows, left), text_batch("t5", other, right)
    decoder = {"decoder_input_ids": target["input_ids"], "decoder_attention_mask": target["attention_mask"]}
    together = states("t5", model, source | decoder)
    for row in range(2):
        alone = text_batch("t5", [rows[row]])
        alone |= {
            "decoder_input_ids": other[row][None],
            "decoder_attention_mask": torch.ones(1, len(other[row]), dtype=torch.long),
        }
        alone = states("t5", model, alone)
        torch.testing.assert_close(together["encoder"][row][left[row]], alone["encoder"][0], **CLOSE)
        torch.testing.assert_close(together["decoder"][row][right[row]], alone["decoder"][0], **CLOSE)


def test_positional_and_keyword_arguments_are_the_same():
    """The mask counts, however it is passed."""
    model = adapted("bert", cell="gru").get_base_model()
    batch = {k: v for k, v in LEFT.items() if k != "position_ids"}
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        actual = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype(dtype):
    """One and zero, true and false: transformers takes them all."""
    model = adapted("bert", cell="gru")
    mask = LEFT["attention_mask"].to(dtype)
    torch.testing.assert_close(
        result("bert", model, LEFT | {"attention_mask": mask}), result("bert", model, LEFT), **EXACT
    )


def test_inputs_embeds():
    """A model that is given embeddings in place of ids is padded the same."""
    model = adapted("bert", cell="gru")
    embeddings = model.get_base_model().embeddings.word_embeddings(LEFT["input_ids"])
    batch = {k: v for k, v in LEFT.items() if k != "input_ids"} | {"inputs_embeds": embeddings}
    torch.testing.assert_close(result("bert", model, batch), result("bert", model, LEFT), **EXACT)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_forward_is_forgotten(error):
    """A forward that failed, or was interrupted from the keyboard, changes nothing for the next one."""
    model, plain = adapted("bert", cell="gru"), batch_of("bert", lengths=(5, 5))
    expected = result("bert", model, plain)

    def fail(*_):
        raise error

    handle = model.get_base_model().encoder.layer[1].register_forward_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(error):
            model(**LEFT)
    handle.remove()
    torch.testing.assert_close(result("bert", model, plain), expected, **EXACT)
    assert error is KeyboardInterrupt or nothing_runs(model)


def test_an_interrupted_forward_is_no_context_for_a_checkpoint():
    """torch calls no hook after one; what stays behind mustn't pass for the call that a recomputation belongs to."""
    model = adapted("bert", cell="gru").train()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.get_base_model().encoder.layer[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**LEFT)
    handle.remove()
    layer = model.get_base_model().encoder.layer[0].output.dense
    outputs = checkpoint(layer, torch.randn(*LEFT["input_ids"].shape, layer.in_features), use_reentrant=False)
    with pytest.raises(RuntimeError, match="recomputed in the backward pass"):
        outputs.sum().backward()


def test_a_call_inside_a_call():
    """A hook may run the model in the middle of a forward: each call keeps its own mask."""
    model, inner = adapted("bert", cell="gru"), batch_of("bert", padding="right", lengths=(4, 2))
    expected_inner, expected = result("bert", model, inner), result("bert", model, LEFT)
    seen, busy = [], []

    def nested(*_):
        if not busy:
            busy.append(True)
            seen.append(result("bert", model, inner))

    handle = model.get_base_model().encoder.layer[0].register_forward_hook(nested)
    actual = result("bert", model, LEFT)
    handle.remove()
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(seen[0], expected_inner, **EXACT)


def test_an_inner_model_called_alone():
    """A decoder called without its head sees its own arguments."""
    model = adapted("llama", cell="gru")
    batch = batch_of("llama", padding="left")
    with torch.no_grad():
        hidden = model.get_base_model().model(**batch).last_hidden_state
        logits = model.get_base_model().lm_head(hidden)
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[valid].flatten(), result("llama", model, batch), **EXACT)


def test_a_layer_called_alone():
    """Outside any forward a layer of a transformers model has to be told which tokens are padding."""
    model = adapted("bert", cell="gru")
    layer = model.get_base_model().encoder.layer[0].output.dense
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match=r"layer\.0\.output\.dense runs outside of a call.*describe_tokens"):
        layer(x)
    with describe_tokens():
        torch.testing.assert_close(layer(x)[1:], layer(x[1:]), **CLOSE)
    valid = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with describe_tokens(valid):
        padded = layer(x)
    with describe_tokens():
        torch.testing.assert_close(padded[1:, 2:], layer(x[1:, 2:]), **CLOSE)
    assert adapted("bert", cell="none").get_base_model().encoder.layer[0].output.dense(x).shape == padded.shape


def test_threads_with_masks_of_their_own():
    """Forwards of one model at the same time, each with another mask and length."""
    model = adapted("bert", cell="gru")
    batches = [
        batch_of("bert", padding=padding, lengths=lengths)
        for padding, lengths in [("left", (3, 9)), ("right", (9, 3)), ("holes", (5, 6, 7)), ("left", (6, 6))]
    ]
    expected = [result("bert", model, batch) for batch in batches]
    with ThreadPoolExecutor(len(batches)) as pool:
        for _ in range(20):
            for actual, value in zip(pool.map(lambda b: result("bert", model, b), batches), expected, strict=True):
                torch.testing.assert_close(actual, value, **CLOSE)


def test_a_thread_in_the_middle_of_anothers_forward():
    """Deterministically: a whole forward in another thread between two layers of this one."""
    model, other = adapted("bert", cell="gru"), batch_of("bert", padding="right", lengths=(4, 2))
    expected, expected_other = result("bert", model, LEFT), result("bert", model, other)
    main, seen = threading.get_ident(), []

    def run_other(*_):
        if threading.get_ident() == main:
            thread = threading.Thread(target=lambda: seen.append(result("bert", model, other)))
            thread.start()
            thread.join()

    handle = model.get_base_model().encoder.layer[0].register_forward_hook(run_other)
    actual = result("bert", model, LEFT)
    handle.remove()
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(seen[0], expected_other, **EXACT)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_copies_are_independent(copied, family):
    """A copy has contexts of its own, shared by its layers, and goes on working when the original is changed."""
    model, batch = adapted(family, cell="gru"), batch_of(family, padding="left" if family == "bert" else "right")
    expected = result(family, model, batch)
    twin = copied(model)
    assert len(contexts(twin)) == len(contexts(model))
    assert contexts(twin).isdisjoint(contexts(model))
    model.unload()
    torch.testing.assert_close(result(family, twin, batch), expected, **EXACT)
    base = twin.unload()
    torch.testing.assert_close(result(family, base, batch), result(family, base_model(family), batch), **EXACT)


def test_a_copy_made_within_a_forward():
    """A copy doesn't inherit the running call of the original."""
    model, copies = adapted("bert", cell="gru"), []
    handle = (
        model.get_base_model().encoder.layer[0].register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    )
    result("bert", model, LEFT)
    handle.remove()
    assert nothing_runs(copies[0])


def test_a_model_within_another_model():
    """An adapted transformer as a part of someone's own module."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = adapted("bert", cell="gru")
            self.head = nn.Linear(WIDTH, 1)

        def forward(self, batch):
            return self.head(self.encoder(**batch).last_hidden_state)

    wrapper = Wrapper()
    with torch.no_grad():
        together = wrapper(LEFT)
        row = {k: v[1:2, -5:] for k, v in LEFT.items()}
        torch.testing.assert_close(together[1:2, -5:], wrapper(row), **CLOSE)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_masks_are_read_once_a_forward(family, monkeypatch):
    """By the first layer, also where each block is given the mask again; on a GPU each look at it waits."""
    read = []
    original = read_layer.padding_of
    monkeypatch.setattr(read_layer, "padding_of", lambda *args: read.append(args[1]) or original(*args))
    model = adapted(family, cell="gru")
    assert sum(isinstance(module, ReadLayer) for module in model.modules()) > 1
    for forwards in (1, 2):
        result(family, model, batch_of(family, padding="left"))
        assert len(read) == forwards


def test_other_masks_are_read_anew():
    """What was found for some masks counts where the very same are given, not where equal ones are."""
    mask = torch.ones(2, 3)
    running = RunningForward.of(ForwardCall())
    masks = [
        {"mask": mask},
        {"mask": mask.clone()},
        {"attention_mask": mask},
        {},
        {"mask": None},
        {"mask": {"full_attention": mask}},
    ]
    for _ in range(2):
        for number, given in enumerate(masks):
            assert running.once(SameObjects(dict(given)), lambda number=number: number) == number
    assert running.once(SameObjects({"mask": mask}), lambda: "not known") == 0
