"""Time has to be the second axis, and torch's layers have to call what is adapted in them."""

import pytest
import torch
from helpers import CLOSE, EXACT, strengthen
from peft import get_peft_model
from torch import nn
from transformers import FSMTConfig, FSMTModel, ProphetNetConfig, ProphetNetModel

from peft_read import ReadConfig


WIDTH = 16
SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
PROPHETNET_SIDE = {"layers": 1, "attention_heads": 2}
# Of torch's own encoder.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


class Encoder(nn.Module):
    """torch's encoder between two projections; in the manner of DETR with time first, if it isn't batch first."""

    def __init__(self, batch_first, enable_nested_tensor=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=batch_first)
        self.enter, self.leave = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=enable_nested_tensor)

    def forward(self, x, hidden=None):
        return self.leave(self.encoder(self.enter(x), src_key_padding_mask=hidden))[..., 0]


class Decoder(nn.Module):
    """torch's decoder, causal."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 32, 0.0, batch_first=True), 2)

    def forward(self, x, memory, hidden=None, seen=None):
        seen = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if seen is None else seen
        return self.decoder(x, memory, tgt_mask=seen, tgt_key_padding_mask=hidden)


def adapted(base, **options):
    torch.manual_seed(0)
    config = ReadConfig(**{"r": 4, "target_modules": ["linear2"]} | options)
    return strengthen(get_peft_model(base, config)).eval()


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def padding():
    hidden = torch.zeros(3, 7, dtype=torch.bool)
    hidden[1, 5:] = hidden[2, 2:] = True
    return hidden


@pytest.mark.parametrize("options", [{}, {"target_modules": None}], ids=["named", "default"])
def test_time_first_is_refused(options):
    """At injection, with the mend; nothing is left on the model, and without a recurrence it works."""
    model = Encoder(batch_first=False)
    with pytest.raises(ValueError, match=r"layers\.0\.linear2: attention with batch_first=False .*batch_first=True"):
        get_peft_model(model, ReadConfig(r=4, **{"target_modules": ["linear2"]} | options))
    assert not any(type(module).__name__.startswith("Read") for module in model.modules())
    x = random(7, 3, 6)
    plain = adapted(model, cell="none")
    torch.testing.assert_close(plain(x)[:, 1:2], plain(x[:, 1:2]), **CLOSE)


def test_blocks_of_ones_own_with_time_first():
    """DETR's and Moment-DETR's own blocks around torch's attention are time first where that is."""

    class Block(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            self.self_attn = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)
            self.linear1, self.linear2 = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

        def forward(self, x):
            x = x + self.self_attn(x, x, x)[0]
            return x + self.linear2(torch.relu(self.linear1(x)))

    def stack(batch_first):
        blocks = nn.ModuleList(Block(batch_first) for _ in range(2))
        return nn.ModuleDict({"layers": blocks, "out": nn.Linear(WIDTH, 2)})

    for target in (["linear2"], None):
        with pytest.raises(ValueError, match=r"layers\.0\.linear2: attention with batch_first=False"):
            get_peft_model(stack(False), ReadConfig(target_modules=target))
        get_peft_model(stack(True), ReadConfig(target_modules=target))
    get_peft_model(stack(False), ReadConfig(target_modules=["out"]))  # not in such a block


@pytest.mark.parametrize("name", ["out_proj", "self_attn.out_proj"])
def test_what_is_never_called_is_refused(name):
    """torch's attention reads the weights of its projection."""
    with pytest.raises(ValueError, match=r"self_attn\.out_proj: torch's nn\.MultiheadAttention reads the weights"):
        get_peft_model(Encoder(True), ReadConfig(target_modules=[name]))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("options", [{"cell": "none"}, {}, {"cell": "lstm", "bidirectional": True}], ids=str)
@pytest.mark.parametrize("targets", [["linear2"], ["linear1", "linear2"], ["linear1"]], ids=str)
def test_evaluation_goes_through_the_adapter(options, targets, nested):
    """torch's fast path doesn't: without gradients the result is that with them, and each row is as alone."""
    model = adapted(Encoder(True, enable_nested_tensor=nested), target_modules=targets, **options)
    x, hidden = random(3, 7, 6), padding()
    for mask in (None, hidden):
        valid = torch.ones_like(hidden) if mask is None else ~mask
        with torch.no_grad():
            fast = model(x, mask)
        slow = model(x, mask)
        torch.testing.assert_close(fast[valid], slow[valid], **CLOSE)
        torch.testing.assert_close(model.train()(x, mask)[valid], slow[valid], **CLOSE)
        for row in range(3):
            alone = model.eval()(x[row : row + 1, valid[row]])[0]
            torch.testing.assert_close(slow[row, valid[row]], alone, **CLOSE)
        with torch.no_grad(), model.disable_adapter():
            assert (model(x, mask) - fast)[valid].abs().max() > 1e-2


@torch.no_grad()
def test_without_an_adapter_torch_does_what_it_did():
    """Bit for bit, by its fast path: disabled, and unloaded."""
    base = Encoder(True, enable_nested_tensor=True).eval()
    x, hidden = random(3, 7, 6), padding()
    expected = base(x, hidden)
    model = adapted(base)
    with model.disable_adapter():
        torch.testing.assert_close(model(x, hidden), expected, **EXACT)
    torch.testing.assert_close(model.unload()(x, hidden), expected, **EXACT)


@torch.no_grad()
def test_nested_tensors_are_refused():
    """torch's encoder makes them by a look at its first layer, which isn't adapted here."""
    model = adapted(Encoder(True, enable_nested_tensor=True), target_modules=["encoder.layers.1.linear2"])
    with pytest.raises(ValueError, match=r"layers\.1\.linear2 can't run over nested.*enable_nested_tensor=False"):
        model(random(3, 7, 6), padding())


@pytest.mark.parametrize("form", [lambda m: m, lambda m: torch.zeros(m.shape).masked_fill(m, -torch.inf)])
def test_a_decoder_of_torch(form):
    """Padding by its own names, as truth values and as numbers; a row is as alone."""
    model = adapted(Decoder(), cell="gru")
    x, memory, hidden = random(3, 7, WIDTH), random(3, 4, WIDTH), torch.zeros(3, 7, dtype=torch.bool)
    hidden[1, 2:4] = hidden[2, 1] = hidden[2, 6] = True
    seen = nn.Transformer.generate_square_subsequent_mask(7)
    outputs = model(x, memory, form(hidden), seen if form(hidden).is_floating_point() else seen.isinf())
    for row in range(3):
        keep = ~hidden[row]
        alone = model(x[row : row + 1, keep], memory[row : row + 1])[0]
        torch.testing.assert_close(outputs[row, keep], alone, **CLOSE)


def test_sequences_packed_for_torchs_layers():
    """By a block-diagonal mask of torch's form, true where tokens may not meet; a tree is refused."""
    model = adapted(Decoder(), cell="gru")
    x, memory = random(2, 7, WIDTH), random(2, 4, WIDTH)
    blocks = torch.block_diag(torch.ones(4, 4), torch.ones(3, 3)).bool().tril()
    for mask in (~blocks, torch.zeros(7, 7).masked_fill(~blocks, -torch.inf), (~blocks).expand(4, 7, 7)):
        packed = model(x, memory, seen=mask, hidden=None)
        alone = torch.cat([model(x[:, cut], memory) for cut in (slice(4), slice(4, 7))], dim=1)
        torch.testing.assert_close(packed, alone, **CLOSE)
    tree = blocks.clone()
    tree[4:, :2] = True
    with pytest.raises(ValueError, match="can't follow this attention mask"):
        model(x, memory, seen=~tree)


def fsmt():
    size = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIDE.items()}
    return FSMTModel(FSMTConfig(langs=["en", "de"], src_vocab_size=50, tgt_vocab_size=50, d_model=WIDTH, **size))


def prophetnet():
    size = {f"num_{side}_{what}": n for side in ("encoder", "decoder") for what, n in PROPHETNET_SIDE.items()}
    size |= {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
    return ProphetNetModel(ProphetNetConfig(vocab_size=50, hidden_size=WIDTH, **size))


@pytest.mark.parametrize(
    ("build", "targets", "reason"),
    [(fsmt, None, "along the first axis"), (prophetnet, r".*decoder.*output", "one after another along its axis")],
)
def test_transformers_own_with_another_axis(build, targets, reason):
    """FSMT runs time first; ProphetNet's decoder lays the streams of its predictions behind each other."""
    with pytest.raises(ValueError, match=reason):
        get_peft_model(build(), ReadConfig(r=4, target_modules=targets))
    get_peft_model(build(), ReadConfig(r=4, cell="none", target_modules=targets))


def test_of_prophetnet_the_encoder_is_adapted():
    """By default, as its decoder can't be."""
    model = get_peft_model(prophetnet(), ReadConfig(r=4))
    assert model.targeted_module_names
    assert all(".encoder." in f".{name}" for name in model.targeted_module_names)
