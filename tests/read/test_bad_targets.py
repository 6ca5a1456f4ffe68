"""Targets that can't be adapted are refused before anything is wrapped; unusual ones that can be are right."""

import warnings

import pytest
import torch
from helpers import CLOSE, adapted, batch_of, images, padding_mask, result, strengthen, token_rows
from models import HEADS, INIT_RANGE, LAYERS, VOCAB, WIDE, WIDTH, base_model
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM, XLNetConfig, XLNetModel

from peft_read import ReadConfig, describe_tokens
from peft_read.read.layer import ReadLayer


def refused(model, message, **options):
    """The model refuses the configuration and is what it was."""
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        inject_adapter_in_model(ReadConfig(**options), model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class Named(nn.Module):
    """Linear layers by the given names, in a row."""

    def __init__(self, *names):
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x


def test_no_module_matched():
    """The message names what was looked for."""
    refused(base_model("bert"), "nonsense", target_modules=["nonsense"])


def test_a_model_without_default_targets():
    """The message says what to set."""
    refused(Named("first"), r"no default targets in a Named.*`target_modules`")


@pytest.mark.parametrize("name", ["spread_out", "thread_head", "read_me"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": True}])
def test_names_that_contain_the_prefix_are_refused(name, options):
    """PEFT would skip such a module when it deletes an adapter, transformers would load it wrongly."""
    model = Named("first", name)
    if options:
        refused(model, f"{name}.*'read_'.*Rename", target_modules=["first"], modules_to_save=[name])
    else:
        refused(model, f"{name}.*'read_'.*Rename", target_modules=["first", name])
        refused(model, f"{name}.*'read_'.*Rename", target_modules="all-linear")
    get_peft_model(model, ReadConfig(target_modules=["first"]))


def test_a_head_below_such_a_name_is_refused():
    """`modules_to_save` matches ends of names: the whole path counts."""
    model = nn.ModuleDict({"spread_out": Named("head"), "body": Named("first")})
    refused(model, r"spread_out\.head.*'read_'", target_modules=["first"], modules_to_save=["head"])


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(3, WIDTH),
        nn.EmbeddingBag(3, WIDTH),
        nn.Conv1d(WIDTH, WIDTH, 1),
        nn.Conv2d(WIDTH, WIDTH, 1),
        nn.ConvTranspose1d(WIDTH, WIDTH, 1),
        nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        nn.GRU(WIDTH, WIDTH),
        nn.ModuleList([nn.Linear(1, 1)]),
    ],
    ids=lambda module: type(module).__name__,
)
def test_unfit_modules_are_refused(module):
    """Modules whose output doesn't end in features, or holds several things; the good target isn't wrapped either."""
    model = Named("first")
    model.add_module("bad", module)
    refused(model, f"bad, a {type(module).__name__}: .*feature dimension", target_modules=["first", "bad"])


def test_a_block_of_unknown_width_is_refused():
    """Without a configuration nobody knows how wide a block's output is."""
    model = nn.ModuleDict({"block": Named("first")})
    refused(model, "block, a Named", target_modules=["block"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart", "t5"])
@pytest.mark.parametrize("layers", [None, [1]])
def test_bidirectional_decoders_are_refused(family, layers):
    """Each token would see its future."""
    refused(base_model(family), "bidirectional.*in a decoder", bidirectional=True, layers_to_transform=layers)


@pytest.mark.parametrize("family", ["bert", "t5_encoder", "vit"])
def test_bidirectional_encoders(family):
    """Encoders may look both ways: the first token's output then depends on the last token."""
    model = adapted(family, bidirectional=True)
    assert result(family, model, batch_of(family)).isfinite().all()
    layer = next(module for module in model.modules() if isinstance(module, ReadLayer))
    x = torch.randn(1, 6, layer.in_features, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, -1] += 1
    with describe_tokens():
        assert (layer(changed)[:, 0] - layer(x)[:, 0]).abs().max() > 100 * CLOSE["atol"]


@pytest.mark.parametrize(("family", "targets"), [("bart", r"encoder\..*fc2"), ("t5", r"encoder\..*\.wo")])
def test_bidirectional_encoder_of_an_encoder_decoder(family, targets):
    """Targeting the encoder alone is allowed, and the decoder stays causal."""
    model = adapted(family, bidirectional=True, target_modules=targets)
    assert len(model.targeted_module_names) == LAYERS
    batch = batch_of(family, padding="right", lengths=(6, 6))
    other = {name: value.clone() for name, value in batch.items()}
    other["decoder_input_ids"][:, 5] += 1
    with torch.no_grad():
        first, second = (model(**b).last_hidden_state[:, :5] for b in (batch, other))
    torch.testing.assert_close(first, second, **CLOSE)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrence_over_frames(cell, bidirectional):
    """The state of each token position runs over its video's frames: a loop over videos and positions by hand."""
    frames, videos = 4, 2
    options = {"cell": cell, "bidirectional": bidirectional, "recur_over": "frames", "num_frames": frames}
    model = adapted("vit", **options)
    layer = next(module for module in model.modules() if isinstance(module, ReadLayer))
    x = torch.randn(videos * frames, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    hidden = layer.base_layer(x)
    expected = torch.empty_like(hidden)
    for video in range(videos):
        for position in range(5):
            rows = slice(video * frames, (video + 1) * frames)
            steps = layer.read_downward["default"](hidden[rows, position])
            states = layer.read_recurrence["default"](steps[None])[0]
            delta = layer.read_upward["default"](nn.functional.gelu(states))
            expected[rows, position] = hidden[rows, position] + delta
    with describe_tokens():
        torch.testing.assert_close(layer(x), expected, **CLOSE)
    with torch.no_grad():
        together = model(pixel_values=images(videos * frames)).last_hidden_state
        alone = model(pixel_values=images(videos * frames)[frames:]).last_hidden_state
    torch.testing.assert_close(together[frames:], alone, **CLOSE)


def test_num_frames_that_does_not_divide_the_batch():
    """The error names the module and both numbers."""
    model = adapted("vit", recur_over="frames", num_frames=4)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.fc2.*num_frames=4.*6 images"):
        model(pixel_values=images(6))


def layer_alone(cell):
    """A model that hands any tensor to its one adapted layer."""
    model = get_peft_model(Named("first"), ReadConfig(r=4, cell=cell, target_modules=["first"]))
    return strengthen(model)


@pytest.mark.parametrize("shape", [(6, WIDTH), (2, 3, 4, WIDTH), (WIDTH,)])
def test_outputs_without_one_time_axis(shape):
    """A recurrence refuses rows without time and feature maps; the plain bottleneck takes them all."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"first gives one of shape.*cell='none'"):
        layer_alone("gru")(x)
    model = layer_alone("none")
    flat = model(x.reshape(1, -1, WIDTH))
    torch.testing.assert_close(model(x).reshape(1, -1, WIDTH), flat, **CLOSE)


def opt():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        init_std=INIT_RANGE,
        dropout=0.0,
    )
    return OPTForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@torch.no_grad()
def test_blocks_that_flatten_their_rows(padding):
    """OPT's feed-forward part sees (batch * time, features): each row as it is alone."""
    model = strengthen(get_peft_model(opt(), ReadConfig(r=4, cell="gru", target_modules=["fc2"])))
    rows, lengths = token_rows((7, 4, 1)), (7, 4, 1)
    mask = padding_mask(lengths, padding, 9)
    ids = torch.full(mask.shape, 7)
    ids[mask] = torch.cat(rows)
    padded = model(input_ids=ids, attention_mask=mask.long()).logits
    for row, valid, tokens in zip(padded, mask, rows, strict=True):
        alone = model(input_ids=tokens[None]).logits[0]
        torch.testing.assert_close(row[valid], alone, rtol=0, atol=1e-4)


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=INIT_RANGE,
    )
    return MixtralForCausalLM(config).eval().requires_grad_(False)


def test_a_mixture_of_experts_as_a_whole():
    """Inside, rows are routed and have no time; the block as a whole has, its width is the model's."""
    base = mixtral()
    with torch.no_grad():
        batch = {"input_ids": torch.stack(token_rows((6, 6)))}
        expected = base(**batch).logits
        model = get_peft_model(base, ReadConfig(r=4, cell="gru", target_modules=["mlp"]))
        assert model.targeted_module_names == [f"model.layers.{i}.mlp" for i in range(LAYERS)]
        assert torch.equal(model(**batch).logits, expected)
        strengthen(model)
        together = model(**batch).logits
        assert (together - expected).abs().max() > 0.1
        for row in range(2):
            alone = model(input_ids=batch["input_ids"][row][None]).logits[0]
            torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-4)
            first = model(input_ids=batch["input_ids"][row][None, :4]).logits[0]
            torch.testing.assert_close(together[row, :4], first, rtol=0, atol=1e-4)
    layer = next(module for module in model.modules() if isinstance(module, ReadLayer))
    assert layer.out_features == WIDTH
    assert {p.device for p in layer.read_upward.parameters()} == {p.device for p in base.parameters()}


class Pair(nn.Linear):
    """A module that gives scores beside its output, as some mixtures of experts do."""

    def forward(self, x):
        return super().forward(x), x.sum()


def test_the_first_of_a_tuple_is_adapted():
    """The rest of it is passed on."""
    model = nn.ModuleDict({"pair": Pair(WIDTH, WIDTH)})
    wrapped = strengthen(inject_adapter_in_model(ReadConfig(r=4, cell="gru", target_modules=["pair"]), model))["pair"]
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    with describe_tokens():
        output, score = wrapped(x)
    base, expected = wrapped.base_layer(x)
    assert torch.equal(score, expected)
    assert (output - base).abs().max() > 0.1


def test_an_output_of_another_width_is_refused():
    """Where the module doesn't give what its sizes promise, the error says both."""

    class Liar(nn.Linear):
        def forward(self, x):
            return super().forward(x)[..., : WIDTH // 2]

    model = nn.ModuleDict({"liar": Liar(WIDTH, WIDTH)})
    wrapped = inject_adapter_in_model(ReadConfig(r=4, target_modules=["liar"]), model)["liar"]
    with pytest.raises(ValueError, match=rf"liar was made for {WIDTH} features.*\(2, 5, {WIDTH // 2}\)"):
        wrapped(torch.zeros(2, 5, WIDTH))


def test_models_with_time_first_are_refused():
    """Their second axis is the batch: a state that runs over it would mix the samples."""
    config = XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=64, vocab_size=20)
    with pytest.raises(ValueError, match="a model of type xlnet has its tokens along the first axis"):
        get_peft_model(XLNetModel(config), ReadConfig())
    assert get_peft_model(XLNetModel(config), ReadConfig(cell="none")).targeted_module_names


def test_injection_leaves_warnings_shown():
    """Python forgets which warnings it has shown wherever some are caught: the same one would come again and again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            adapted("bert")
            warnings.warn("once", FutureWarning, stacklevel=1)
    assert [str(each.message) for each in caught].count("once") == 1
