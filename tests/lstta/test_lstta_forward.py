"""What happens in a forward of LSTTA: importance, who sees whom, checkpointing, failures, precision, threads."""

import threading

import pytest
import torch
from lstta_models import (
    CLOSE,
    INPUTS,
    TOWERS,
    adapted,
    adapter_parameters,
    assert_other,
    assert_same,
    batch_of,
    composite,
    result,
    states_of,
    strengthen,
    two_adapters,
)
from peft import get_peft_model
from trimodal_families import BATCH, FRAMES, WIDTH

from peft_read import LsttaConfig
from peft_read.lockstep.coroutines import LockstepError
from peft_read.lstta.layer import LsttaLayer


def test_frame_importance():
    """One tensor a level, in [0, 1], without a graph, of the last forward only."""
    model = adapted()
    model(**INPUTS)
    importance = model.get_frame_importance()
    assert [tuple(g.shape) for g in importance] == [(BATCH, FRAMES)] * 4
    assert all(((g >= 0) & (g <= 1)).all() and not g.requires_grad for g in importance)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    model(**INPUTS, frame_mask=mask)
    masked = model.get_frame_importance()
    assert len(masked) == 4
    assert all(g[0, 3] == 0 and g[0, :3].min() > 0 for g in masked)
    torch.testing.assert_close(masked[0][1], importance[0][1], **CLOSE)


def test_frame_importance_is_forgotten():
    """It is of the last forward, not of one before."""
    model = adapted()
    model(**INPUTS)
    model(**{k: v for k, v in INPUTS.items() if k != "pixel_values"})
    with pytest.raises(ValueError, match="last forward was made without it or without `pixel_values`"):
        model.get_frame_importance()


def test_frame_importance_of_several_adapters():
    """Each adapter has its own."""
    model = two_adapters(frame_filter=False)
    model.base_model.set_adapter(["default", "second"])
    model(**INPUTS)
    assert len(model.get_frame_importance()) == 4
    with pytest.raises(ValueError, match=r"adapter 'second'.*frame_filter=False"):
        model.get_frame_importance("second")


def test_filter_can_be_left_out():
    """Without it the frames weigh alike, and there are fewer weights."""
    plain = adapted(frame_filter=False)
    assert not any("judge" in name for name in adapter_parameters(plain))
    assert_other(result(plain, INPUTS), result(adapted(), INPUTS), TOWERS)


def test_windows_matter():
    """A window of one frame and one of four give other results."""
    assert_other(result(adapted(window=1), INPUTS), result(adapted(window=4), INPUTS), TOWERS)


def changed_rows(got, wanted):
    """Rows of the first sample, `(rows, ...)`, that differ."""
    return {i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if not torch.equal(a, b)}


@pytest.mark.parametrize("frame_filter", [False, True])
def test_who_sees_a_change_of_one_frame(frame_filter):
    """Short-term: what is in its window, and text. Long-term: everything, through the importance of the frames."""
    # One level, after the last blocks, since within a tower everything sees everything.
    model = adapted(num_levels=1, frame_filter=frame_filter)
    pixels = INPUTS["pixel_values"].clone()
    pixels[0, 3] += 1
    got, wanted = result(model, INPUTS | {"pixel_values": pixels}), result(model, INPUTS)
    steps = wanted["audio"].shape[1]
    second_half = {step for step in range(steps) if (2 * step + 1) * FRAMES // (2 * steps) >= 2}
    everything = set(range(steps))
    assert changed_rows(got["vision"][:FRAMES], wanted["vision"][:FRAMES]) == (set(range(4)) if frame_filter else {3})
    heard = changed_rows(got["audio"][0], wanted["audio"][0])
    assert heard == (everything if frame_filter else second_half)
    assert changed_rows(got["text"][0], wanted["text"][0]) == set(range(9))
    assert_same({k: v[-1] for k, v in got.items()}, {k: v[-1] for k, v in wanted.items()})


def test_prefix_tokens_do_not_carry_masked_sound():
    """AST's two class tokens have seen the padding: nobody attends to them where there is some."""
    families = ("vit", "ast", "bert")
    model, inputs = adapted(families, num_levels=1), batch_of(families)
    block = model.base_model.model.audio_model.layers[3].base_layer

    def results(strength, mask):
        def replace(_, __, output):
            output[:, :2] += strength * torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
            return output

        handle = block.register_forward_hook(replace)
        got = result(model, inputs | {"audio_mask": mask})
        handle.remove()
        return got

    mask = torch.ones(BATCH, inputs["sound"].shape[1], dtype=torch.bool)
    assert_other(results(5.0, mask), results(0.0, mask), ["vision", "text"])
    mask[:, -20:] = False
    assert_same(results(5.0, mask), results(0.0, mask), ["vision", "text"])


def watch_layers(model):
    """What each adapted block gives, by its name, as soon as the model has run; and the hooks to remove."""
    seen = {}

    def watch(name):
        return lambda _, __, output: seen.__setitem__(name, output[0] if isinstance(output, tuple) else output)

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LsttaLayer)}
    return seen, [module.register_forward_hook(watch(name)) for name, module in layers.items()]


def test_hidden_states_show_the_adapted_stream():
    """`output_hidden_states` holds what the next block gets, installed before or after the adapter."""
    for base_first in (True, False):
        base = composite()
        if base_first:
            base(**INPUTS, output_hidden_states=True)
        model = adapted(base=base)
        seen, handles = watch_layers(model)
        outputs = model(**INPUTS, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        for tower_name in TOWERS:
            states = outputs[tower_name].hidden_states
            adapted_states = [state for name, state in seen.items() if f".{tower_name}_model." in name]
            assert len(states) == len(adapted_states) + 1
            for got, wanted in zip(states[1:-1], adapted_states, strict=False):
                assert got is wanted


def checkpoint_blocks(model, use_reentrant):
    """transformers has renamed the method."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("families", [("vit", "wav2vec2", "bert"), ("swin", "ast", "roberta")], ids="+".join)
@pytest.mark.parametrize("use_reentrant", [True, False])
# Of the blocks before the first adapter, which have nothing to train.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_gradient_checkpointing(families, use_reentrant):
    """The same gradients, also where a tower would checkpoint whole stages; and the switch is put back."""
    model, inputs = adapted(families).train(), batch_of(families)
    towers = [model.base_model.model.get_submodule(f"{name}_model") for name in TOWERS]
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            for each in towers:
                checkpoint_blocks(each, use_reentrant)
        sum(states.square().mean() for states in states_of(model(**inputs)).values()).backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(model).items()})
        model.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    if families[0] == "swin":
        stages = model.base_model.model.vision_model.encoder.layers
        assert not any(stage.gradient_checkpointing for stage in stages)
        model.unload()
        assert all(stage.gradient_checkpointing for stage in stages)


def test_a_failing_tower_leaves_no_half_run_state():
    """The error names its tower, and the model works as before."""
    model = adapted()
    wanted = result(model, INPUTS)
    block = model.base_model.model.audio_model.encoder.layers[2]

    def fail(*_):
        raise RuntimeError("no more sound")

    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no more sound") as caught:
        model(**INPUTS)
    assert any("audio tower" in note for note in caught.value.__notes__)
    handle.remove()
    assert_same(result(model, INPUTS), wanted)


def test_a_failing_exchange_leaves_no_half_run_state(monkeypatch):
    """An error in an adapter ends the forward as one in a tower does."""
    model = adapted()
    wanted = result(model, INPUTS)
    with monkeypatch.context() as patch:
        patch.setattr("peft_read.lstta.exchange.interact", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**INPUTS)
    assert_same(result(model, INPUTS), wanted)


def test_half_precision_towers():
    """Adapters are float32 in bfloat16 towers, and compute so."""
    model = adapted(base=composite().bfloat16())
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in INPUTS.items()}
    outputs = result(model, inputs)
    assert {x.dtype for x in outputs.values()} == {torch.bfloat16}
    wanted = result(adapted(), INPUTS)
    for name in TOWERS:
        assert (outputs[name].float() - wanted[name]).abs().mean() < 0.1 * wanted[name].abs().mean()


def test_autocast():
    """Under autocast the towers run in bfloat16, the adapters in float32, and gradients are float32."""
    model = adapted().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = states_of(model(**INPUTS))
    sum(x.float().square().mean() for x in outputs.values()).backward()
    assert {p.grad.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    exact = result(model, INPUTS)
    for name in TOWERS:
        assert (outputs[name].float() - exact[name]).abs().mean() < 0.1 * exact[name].abs().mean()


def test_weights_in_half_precision():
    """Without PEFT's upcast, as in transformers' `add_adapter`, weights are the base's and the computing float32."""
    model = get_peft_model(
        composite().bfloat16(), LsttaConfig(r=8, num_heads=2, window=2), autocast_adapter_dtype=False
    ).eval()
    strengthen(model)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.bfloat16}
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in INPUTS.items()}
    twin = adapted(base=composite().bfloat16())
    with torch.no_grad():
        for name, parameter in adapter_parameters(twin).items():
            parameter.copy_(adapter_parameters(model)[name])
    assert_same(result(model, inputs), result(twin, inputs))


def test_dropout_in_training_only():
    """The adapter's dropout acts on its output, in training."""
    model = adapted(dropout=0.5)
    wanted = result(model, INPUTS)
    assert_same(wanted, result(adapted(), INPUTS))
    model.train()
    torch.manual_seed(0)
    first = result(model, INPUTS)
    assert_other(first, wanted, TOWERS)
    torch.manual_seed(0)
    assert_same(result(model, INPUTS), first)


def test_threads_share_a_model():
    """Concurrent forwards don't meet each other's towers."""
    model = adapted()
    batches = [batch_of(seed=seed) for seed in range(4)]
    wanted = [result(model, batch) for batch in batches]
    got = [None] * 4

    def run(i):
        for _ in range(3):
            got[i] = result(model, batches[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each, expected in zip(got, wanted, strict=True):
        assert_same(each, expected, **CLOSE)


def test_no_graph_is_kept():
    """Nothing holds on to the activations of a forward."""
    model = adapted().train()
    outputs = states_of(model(**INPUTS))
    sum(x.sum() for x in outputs.values()).backward()
    exchange = model.base_model.model.make_exchange
    assert all(not g.requires_grad and g.grad_fn is None for levels in exchange.importance.values() for g in levels)
    kept = {name for name, value in vars(exchange).items() if not isinstance(value, int)}
    assert kept == {"importance", "stages", "listeners", "_switched_off"}


def test_recomputing_around_a_block_is_refused():
    """A checkpoint around an adapted block would run it again without the other towers."""
    model = adapted().train()
    block = model.base_model.model.text_model.encoder.layer[1]
    forward = block.forward
    block.forward = lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(
        forward, *args, use_reentrant=False, **kwargs
    )
    with pytest.raises(LockstepError, match="checkpoint"):
        sum(x.sum() for x in states_of(model(**INPUTS)).values()).backward()
