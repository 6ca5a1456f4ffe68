"""Gradient checkpointing recomputes layers outside the forward: the gradients have to be those without it."""

from functools import partial

import pytest
import torch
from helpers import (
    LENGTHS,
    adapted,
    adapter_parameters,
    batch_of,
    enable_checkpointing,
    hide_masks,
    loss_of,
    padding_mask,
    strengthen,
    text_batch,
)
from helpers import token_rows as rows_of
from models import FAMILIES, base_model
from peft import get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_read import ReadConfig


# Relative to each gradient's largest entry: the same sums, possibly in another order.
TOLERANCE = 1e-4
REENTRANT = pytest.mark.parametrize("use_reentrant", [True, False])
PADDED = [
    ("bert", "holes"),
    ("bart", "right"),
    ("t5_encoder", "left"),
    ("t5", "left"),
    ("llama", "left"),
    ("gpt2", "left"),
    ("clip", "left"),
    ("vit", None),
]


def prepare_images(family, batch):
    if FAMILIES[family].images:
        batch = batch | {"pixel_values": batch["pixel_values"].clone().requires_grad_()}
    return batch


def gradients(family, model, batches):
    """Gradients of the sum of the losses of several forwards, all of which run before the backward."""
    model.train().zero_grad()
    sum(loss_of(family, model, prepare_images(family, batch)) for batch in batches).backward()
    return {name: p.grad.clone() for name, p in adapter_parameters(model).items()}


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=TOLERANCE * scale)


def count_recomputations(monkeypatch):
    """How often layers run in a backward pass: a test of checkpointing in which none does shows nothing."""
    from peft_read.read.layer import ReadLayer

    count = [0]
    original = ReadLayer.forward

    def counted(self, *args, **kwargs):
        count[0] += torch._C._current_graph_task_id() != -1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ReadLayer, "forward", counted)
    return count


def two_batches(family, padding):
    """Two batches of different masks and lengths."""
    if padding is None:
        return [batch_of(family), batch_of(family, lengths=(2, 2))]
    return [batch_of(family, padding=padding), batch_of(family, padding=padding, lengths=(2, 9))]


@REENTRANT
@pytest.mark.parametrize(("family", "padding"), PADDED)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_gradients_are_those_without_it(family, padding, cell, use_reentrant, monkeypatch):
    """Two padded forwards with different masks before one backward, whose recomputations each see their own mask."""
    batches = two_batches(family, padding)
    expected = gradients(family, adapted(family, cell=cell), batches)
    model = adapted(family, cell=cell)
    enable_checkpointing(model, use_reentrant)
    recomputed = count_recomputations(monkeypatch)
    assert_same_gradients(gradients(family, model, batches), expected)
    assert recomputed[0] == len(batches) * len(FAMILIES[family].targets)


def test_a_wrong_mask_would_show(monkeypatch):
    """With the mask kept from the adapter the gradients differ by far: the test above can tell."""
    batches = two_batches("llama", "left")
    expected = gradients("llama", adapted("llama", cell="gru"), batches)
    hide_masks(monkeypatch)
    actual = gradients("llama", adapted("llama", cell="gru"), batches)
    assert max((actual[k] - v).abs().max() / v.abs().max() for k, v in expected.items()) > 100 * TOLERANCE


@REENTRANT
def test_switched_on_before_injection(use_reentrant):
    """Whether checkpointing or the adapter comes first makes no difference."""
    batches = two_batches("llama", "left")
    expected = gradients("llama", adapted("llama", cell="gru"), batches)
    base = base_model("llama")
    enable_checkpointing(base, use_reentrant)
    model = strengthen(get_peft_model(base, ReadConfig(r=4, cell="gru")))
    assert_same_gradients(gradients("llama", model, batches), expected)


@REENTRANT
def test_switched_on_and_off_between_steps(use_reentrant):
    """Checkpointing may change at any time: after a plain step, and back again."""
    batches = two_batches("bert", "left")
    model = adapted("bert", cell="gru")
    expected = gradients("bert", model, batches)
    enable_checkpointing(model, use_reentrant)
    for _ in range(2):
        assert_same_gradients(gradients("bert", model, batches), expected)
    base = model.get_base_model()
    getattr(base, "activation_checkpointing_disable", base.gradient_checkpointing_disable)()
    assert_same_gradients(gradients("bert", model, batches), expected)


@REENTRANT
def test_unload_takes_our_part_off_the_checkpoints(use_reentrant):
    """The unloaded base model checkpoints as it did, with its own function."""
    model = adapted("bert", cell="gru")
    enable_checkpointing(model, use_reentrant)
    base = model.get_base_model()
    blocks = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [block._gradient_checkpointing_func for block in blocks]
    gradients("bert", model, two_batches("bert", "left"))
    model.unload()
    assert [block._gradient_checkpointing_func for block in blocks] == before


@REENTRANT
def test_backward_in_reverse_order_of_forwards(use_reentrant):
    """Each recomputation finds the call that it belongs to, whatever has run since."""
    batches = two_batches("llama", "left")
    model = adapted("llama", cell="gru")
    expected = gradients("llama", model, batches)
    enable_checkpointing(model, use_reentrant)
    model.train().zero_grad()
    losses = [loss_of("llama", model, batch) for batch in batches]
    with torch.no_grad():
        model.eval()(**batch_of("llama", lengths=(3,)))
    model.train()
    for loss in losses:
        loss.backward()
    assert_same_gradients({name: p.grad for name, p in adapter_parameters(model).items()}, expected)


@pytest.mark.parametrize("impl", [CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT])
def test_torch_checkpoint_wrapper(impl, monkeypatch):
    """The wrapper that FSDP's users put around blocks."""
    batches = two_batches("bert", "left")
    expected = gradients("bert", adapted("bert", cell="gru"), batches)
    model = adapted("bert", cell="gru")
    blocks = tuple({type(block) for block in model.get_base_model().encoder.layer})
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, checkpoint_impl=impl),
        check_fn=lambda module: isinstance(module, blocks),
    )
    model.get_base_model().enable_input_require_grads()
    recomputed = count_recomputations(monkeypatch)
    actual = gradients("bert", model, batches)
    actual = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in actual.items()}
    assert_same_gradients(actual, expected)
    assert recomputed[0] == len(batches) * len(FAMILIES["bert"].targets)


@REENTRANT
def test_an_unknown_checkpoint_is_refused(use_reentrant):
    """Where nobody tells the layer which call is recomputed, it says so rather than lose the padding."""
    model = adapted("bert", cell="gru").train()
    block = model.get_base_model().encoder.layer[1]
    original = block.forward
    # A reentrant checkpoint takes no keyword arguments.
    block.forward = lambda *args, **kwargs: checkpoint(partial(original, **kwargs), *args, use_reentrant=use_reentrant)
    model.get_base_model().enable_input_require_grads()
    loss = loss_of("bert", model, batch_of("bert", padding="left"))
    with pytest.raises(RuntimeError, match=r"recomputed.*checkpoint.*gradient_checkpointing_enable"):
        loss.backward()


@REENTRANT
def test_adapter_without_recurrence(use_reentrant):
    """`cell='none'` needs no mask, but goes the same way."""
    batches = two_batches("bert", "left")
    expected = gradients("bert", adapted("bert", cell="none"), batches)
    model = adapted("bert", cell="none")
    enable_checkpointing(model, use_reentrant)
    assert_same_gradients(gradients("bert", model, batches), expected)


def test_dropout_is_the_same_in_the_recomputation():
    """The random state is restored for the recomputation, the adapter's dropout included."""
    batches = [text_batch("bert", rows_of(), padding_mask(LENGTHS, "left", 10))]
    results = []
    for checkpointed in (False, True):
        model = adapted("bert", cell="gru", dropout=0.5)
        if checkpointed:
            enable_checkpointing(model, False)
        torch.manual_seed(0)
        results.append(gradients("bert", model, batches))
    assert_same_gradients(results[1], results[0])
