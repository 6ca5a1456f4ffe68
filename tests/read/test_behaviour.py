"""What READ has to do in every model family and with every cell: one table of rows, each through all behaviours."""

import pytest
import torch
from helpers import (
    CLOSE,
    EXACT,
    LENGTHS,
    adapted,
    adapter_parameters,
    batch_of,
    hide_masks,
    loss_of,
    padding_mask,
    result,
    states,
    strengthen,
    text_batch,
    token_rows,
)
from models import FAMILIES, VOCAB, base_model
from peft import PeftModel, get_peft_model

from peft_read import ReadConfig


FRAMES = {"recur_over": "frames", "num_frames": len(LENGTHS)}
ROWS = [
    pytest.param(family, options, id="-".join([family, *map(str, options.values())]))
    for family, options in [
        ("bert", {"cell": "rnn"}),
        ("bert", {"cell": "gru"}),
        ("bert", {"cell": "lstm"}),
        ("bert", {"cell": "none"}),
        ("bert", {"cell": "gru", "bidirectional": True}),
        ("bert", {"cell": "lstm", "bidirectional": True}),
        ("bart", {"cell": "gru"}),
        ("t5_encoder", {"cell": "rnn", "bidirectional": True}),
        ("t5", {"cell": "lstm"}),
        ("llama", {"cell": "rnn"}),
        ("llama", {"cell": "gru"}),
        ("llama", {"cell": "none"}),
        ("gpt2", {"cell": "lstm"}),
        ("vit", {"cell": "gru"}),
        ("vit", {"cell": "rnn", "bidirectional": True}),
        ("vit", {"cell": "gru", **FRAMES}),
        ("clip", {"cell": "rnn"}),
    ]
]
EVERY_ROW = pytest.mark.parametrize(("family", "options"), ROWS)
TEXT_ROWS = pytest.mark.parametrize(
    ("family", "options", "padding"),
    [
        pytest.param(*row.values, padding, id=f"{row.id}-{padding}")
        for row in ROWS
        for padding in FAMILIES[row.values[0]].paddings
    ],
)


def config_of(options):
    return ReadConfig(r=4, scaling=0.7, **options)


def fingerprint(model):
    """Type, attributes and hooks of every module, to see whether anything is left behind."""
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            {key: len(value) for key, value in module.__dict__.items() if key.endswith(("_hooks", "_with_kwargs"))},
        )
        for name, module in model.named_modules()
    }


@EVERY_ROW
def test_default_targets_are_the_feed_forward_outputs(family, options):
    """The defaults hit each block's feed-forward output, both towers' and stacks', and nothing else."""
    model = get_peft_model(base_model(family), config_of(options))
    assert model.targeted_module_names == list(FAMILIES[family].targets)


@EVERY_ROW
def test_starts_as_the_base_model(family, options):
    """Training starts from the pretrained model: bit for bit, for padded rows too, in training mode too."""
    base, batch = base_model(family), batch_of(family)
    expected = states(family, base, batch)
    model = get_peft_model(base, config_of(options))
    for mode in (model.train(), model.eval()):
        actual = states(family, mode, batch)
        assert all(torch.equal(actual[kind], expected[kind]) for kind in expected)


@EVERY_ROW
def test_an_adapter_acts_on_every_token(family, options):
    """The other tests of this file compare outputs that the adapter changes strongly."""
    batch = batch_of(family)
    before, after = (
        states(family, model, batch) for model in (base_model(family), adapted(family, scaling=0.7, **options))
    )
    for kind, tokens in before.items():
        assert ((after[kind] - tokens).abs().amax(-1) > 0.02).all()


@EVERY_ROW
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_training_step_changes_the_adapter_only(family, options, mode):
    """Adapters train, also where the model stays in eval mode, and the frozen model keeps every bit."""
    model = adapted(family, scaling=0.7, **options)
    model.train(mode == "train")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss_of(family, model, batch_of(family)).backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(adapter_parameters(model))


@EVERY_ROW
@pytest.mark.parametrize("length", [1, 4])
def test_every_trainable_parameter_gets_a_gradient(family, options, length):
    """Distributed training waits for each gradient: the recurrent matrix has one, of zeros, also for one token."""
    model = adapted(family, scaling=0.7, **options).train()
    loss_of(family, model, batch_of(family, lengths=(length,) * len(LENGTHS))).backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == adapter_parameters(model).keys()
    assert [name for name, p in trainable.items() if p.grad is None] == []


@EVERY_ROW
def test_disabled_adapter_is_the_base_model(family, options):
    """`disable_adapter` gives the pretrained model back bit for bit, and the adapter afterwards."""
    batch = batch_of(family)
    expected = result(family, base_model(family), batch)
    model = adapted(family, scaling=0.7, **options)
    enabled = result(family, model, batch)
    with model.disable_adapter():
        torch.testing.assert_close(result(family, model, batch), expected, **EXACT)
    torch.testing.assert_close(result(family, model, batch), enabled, **EXACT)


@EVERY_ROW
def test_unload_gives_the_base_model_back(family, options):
    """After `unload` the model computes what it did and holds no wrapper, hook or attribute of ours."""
    base, batch = base_model(family), batch_of(family)
    expected, print_before = result(family, base, batch), fingerprint(base)
    model = strengthen(get_peft_model(base, config_of(options)))
    result(family, model.train(), batch)
    unloaded = model.unload().eval()
    assert unloaded is base
    torch.testing.assert_close(result(family, unloaded, batch), expected, **EXACT)
    print_after = fingerprint(unloaded)
    assert print_after == print_before


@EVERY_ROW
@pytest.mark.parametrize("name", ["default", "other"])
def test_saved_and_loaded_adapter_is_the_same(family, options, name, tmp_path):
    """A saved adapter gives the same output on a fresh base model, whatever name it is loaded under."""
    model, batch = adapted(family, scaling=0.7, **options), batch_of(family)
    model.save_pretrained(tmp_path)
    # Trainable as the original is: torch may multiply frozen matrices in another order.
    loaded = PeftModel.from_pretrained(base_model(family), tmp_path, adapter_name=name, is_trainable=True).eval()
    torch.testing.assert_close(result(family, loaded, batch), result(family, model, batch), **EXACT)


@TEXT_ROWS
def test_padding_never_changes_a_valid_token(family, options, padding):
    """A padded batch gives each row's valid tokens what the row gives alone, wherever the padding stands."""
    model, base, rows = adapted(family, scaling=0.7, **options), base_model(family), token_rows()
    mask = padding_mask(LENGTHS, padding, max(LENGTHS) + 2)
    for check in (base, model):
        padded = states(family, check, text_batch(family, rows, mask))
        for row, tokens in enumerate(rows):
            alone = states(family, check, text_batch(family, [tokens]))
            for kind in FAMILIES[family].parts.keys() - {"image"}:
                torch.testing.assert_close(padded[kind][row][mask[row]], alone[kind][0], **CLOSE)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize(("family", "padding"), [("bert", "holes"), ("t5", "left"), ("llama", "left")])
def test_padding_would_show(family, cell, padding, monkeypatch):
    """With the mask kept from the adapter the test above fails by far: it can tell."""
    model, rows = adapted(family, cell=cell), token_rows()
    batch = text_batch(family, rows, padding_mask(LENGTHS, padding, max(LENGTHS) + 2))
    right = result(family, model, batch)
    hide_masks(monkeypatch)
    assert (result(family, model, batch) - right).abs().max() > 500 * CLOSE["atol"]


@TEXT_ROWS
def test_padding_has_no_gradient(family, options, padding):
    """The gradients of a padded batch are the sum of its rows' own: nothing of the padding gets in."""
    model, rows = adapted(family, scaling=0.7, **options), token_rows()
    mask = padding_mask(LENGTHS, padding, max(LENGTHS) + 2)
    kinds = sorted(FAMILIES[family].parts.keys() - {"image"})
    probe = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))

    def gradients(batches):
        model.zero_grad()
        for batch, valid in batches:
            parts = states(family, model, batch)
            sum((parts[kind][valid] @ probe[: parts[kind].shape[-1]]).sum() for kind in kinds).backward()
        return {name: p.grad.clone() for name, p in adapter_parameters(model).items() if p.grad is not None}

    padded = gradients([(text_batch(family, rows, mask), mask)])
    alone = gradients([(text_batch(family, [row]), torch.ones(1, len(row), dtype=torch.bool)) for row in rows])
    assert padded.keys() == alone.keys()
    for name, gradient in padded.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize(("family", "options"), [row for row in ROWS if "num_frames" not in row.values[1]])
def test_batch_is_a_loop_over_samples(family, options):
    """No sample of a batch sees another; where time runs over frames, test_bad_targets.py has several videos."""
    model, batch = adapted(family, scaling=0.7, **options), batch_of(family, lengths=(6,) * len(LENGTHS))
    together = states(family, model, batch)
    for row in range(len(LENGTHS)):
        alone = states(family, model, {name: value[row : row + 1] for name, value in batch.items()})
        for kind, tokens in alone.items():
            torch.testing.assert_close(together[kind][row], tokens[0], **CLOSE)


@EVERY_ROW
def test_wrapper_shows_the_attributes_of_its_base(family, options):
    """Blocks read attributes of the modules they call (T5's `wo.weight.dtype`): the wrapper passes them on."""
    base, name = base_model(family), FAMILIES[family].targets[0]
    module = base.get_submodule(name)
    shown = {"weight": module.weight, "bias": module.bias}
    for attribute in ("in_features", "out_features", "nf"):
        if hasattr(module, attribute):
            shown[attribute] = getattr(module, attribute)
    wrapper = get_peft_model(base, config_of(options)).get_submodule(f"base_model.model.{name}")
    assert wrapper is not module
    assert all(getattr(wrapper, attribute) is value for attribute, value in shown.items())
    with pytest.raises(AttributeError, match="nonsense"):
        wrapper.nonsense  # noqa: B018  (the access is the test)
