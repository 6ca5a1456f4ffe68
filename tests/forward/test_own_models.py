"""Models of one's own: parts called twice, by other methods, alone, and masks that come by any way."""

import warnings

import pytest
import torch
from helpers import CLOSE, strengthen
from peft import get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from peft_read import ReadConfig, describe_tokens


WIDTH = 16


def encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Twice(nn.Module):
    """One encoder for video and for text, as some dual encoders share theirs."""

    def __init__(self):
        super().__init__()
        self.encoder = encoder()

    def forward(self, video, video_padding, text, text_padding):
        return self.encode(video, video_padding), self.encode(text, text_padding)

    def encode(self, x, padding):
        return self.encoder(x, src_key_padding_mask=padding)


class Mixer(nn.Module):
    """Blocks that take no mask, in a model that takes one of torch's names, by keyword alone."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x, *, src_key_padding_mask=None):
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x


class KeywordBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, *, key_padding_mask=None):
        return x + torch.relu(self.out(x))


class Keywords(nn.Module):
    """Its mask has a name of its own, its blocks' mask one of torch's, by keyword alone."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(KeywordBlock() for _ in range(2))

    def forward(self, x, padded):
        for layer in self.layers:
            x = layer(x, key_padding_mask=padded)
        return x


def adapted(base, **options):
    torch.manual_seed(0)
    config = ReadConfig(**{"r": 4, "cell": "gru", "target_modules": ["linear2"]} | options)
    return strengthen(get_peft_model(base, config)).eval()


def padded_pair():
    generator = torch.Generator().manual_seed(1)
    video, text = (torch.randn(2, 6, WIDTH, generator=generator) for _ in range(2))
    video_padding, text_padding = torch.zeros(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    video_padding[0, :3] = text_padding[1, :2] = True
    return video, video_padding, text, text_padding


def worst(together, x, padding, alone):
    """The largest difference of valid tokens from those of each row alone."""
    errors = [together[i, ~padding[i]] - alone(x[i : i + 1, ~padding[i]])[0] for i in range(len(x))]
    return float(torch.cat(errors).abs().max())


@torch.no_grad()
def test_a_part_that_runs_twice_in_a_call():
    """Each time under the mask that it's given then; the two are of one size."""
    model, (video, video_padding, text, text_padding) = adapted(Twice()), padded_pair()
    videos, texts = model(video, video_padding, text, text_padding)

    def alone(x):
        return model(x, None, x, None)[0]

    assert worst(videos, video, video_padding, alone) < 2e-5
    assert worst(texts, text, text_padding, alone) < 2e-5
    assert worst(texts, text, video_padding, alone) > 1e-3


@pytest.mark.parametrize("impl", [CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT])
def test_a_checkpoint_of_a_part_that_runs_twice(impl):
    """The recomputation of the first run is under the first mask, though the second came since."""
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(1)
        base = Twice()
        if wrapped:
            for i, layer in enumerate(base.encoder.layers):
                base.encoder.layers[i] = checkpoint_wrapper(layer, checkpoint_impl=impl)
        model = adapted(base).train()
        video, video_padding, text, text_padding = padded_pair()
        videos, texts = model(video.requires_grad_(), video_padding, text.requires_grad_(), text_padding)
        (videos[~video_padding][:, :3].sum() + texts[~text_padding][:, :5].sum()).backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "read_" in name])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_another_method():
    """A part reads its mask though nothing called the model; it's forgotten afterwards."""
    model, (video, video_padding, *_) = adapted(Twice()), padded_pair()
    base = model.get_base_model()
    for call in (base.encode, lambda x, p: base.encoder(x, src_key_padding_mask=p)):
        together = call(video, video_padding)
        assert worst(together, video, video_padding, lambda x, call=call: call(x, None)) < 2e-5
    assert base.encoder.layers[0].linear2.context.running() is None
    with pytest.raises(AssertionError, match="embedding dimension"):
        base.encode(video[..., 1:], video_padding)
    assert base.encoder.layers[0].linear2.context.running() is None


@torch.no_grad()
def test_another_method_of_a_model_that_gives_its_parts_no_mask():
    """Nothing is known, which is said, once."""

    class Named(Mixer):
        def encode(self, x):
            return self.layers[1](self.layers[0](x))

    model = adapted(Named(), target_modules=["layers.0", "layers.1"])
    x = padded_pair()[0]
    with pytest.warns(UserWarning, match=r"takes all tokens as valid, but layers\.0 runs outside of a call.*describe"):
        output = model.get_base_model().encode(x)
    torch.testing.assert_close(model.get_base_model().encode(x), output)  # warnings are errors here
    with describe_tokens():
        torch.testing.assert_close(model.get_base_model().encode(x), output)


@pytest.mark.parametrize(
    ("build", "targets"),
    [(Mixer, ["layers.0", "layers.1"]), (Keywords, ["out"])],
)
@torch.no_grad()
def test_masks_by_keyword(build, targets):
    """The model's own and its blocks'."""
    model, (x, padding, *_) = adapted(build(), target_modules=targets), padded_pair()
    name = "src_key_padding_mask" if build is Mixer else "padded"
    together = model(x, **{name: padding})
    assert worst(together, x, padding, lambda x: model(x, **{name: None})) < 2e-5


@torch.no_grad()
def test_sequences_by_a_mask_of_pairs_alone():
    """torch's encoder is given `mask` and no padding: sequences are apart, a tree is refused."""

    class Packed(Twice):
        def forward(self, x, blocks):
            return self.encoder(x, mask=blocks)

    model, x = adapted(Packed(), bidirectional=True), padded_pair()[0]
    blocks = torch.block_diag(torch.ones(4, 4), torch.ones(2, 2)) == 0
    alone = torch.cat([model(x[:, cut], None) for cut in (slice(4), slice(4, 6))], dim=1)
    torch.testing.assert_close(model(x, blocks), alone, **CLOSE)
    blocks[4:, 0] = False
    with pytest.raises(ValueError, match="can't follow this attention mask"):
        model(x, blocks)


@torch.no_grad()
def test_a_mask_that_is_for_another_part():
    """The text's mask isn't the video's, whose encoder says that nothing is padded; nor is that worth a warning."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.video, self.text = encoder(), encoder()

        def forward(self, video, input_ids, attention_mask, loss_mask=None):
            return self.video(video), self.text(input_ids, src_key_padding_mask=attention_mask == 0)

    model, (video, _, text, text_padding) = adapted(Pair()), padded_pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        videos, texts = model(video[:, :5], text, (~text_padding).long(), torch.ones(2, 6))
        alone = model(video[:1, :5], text[:1], torch.ones(1, 6))[0]
    torch.testing.assert_close(videos[:1], alone, **CLOSE)
    assert worst(texts, text, text_padding, lambda x: model(x, x, torch.ones(1, x.shape[1]))[1]) < 2e-5


def test_a_checkpoint_of_whole_calls():
    """It runs them again where their description has ended: refused, with the place where that belongs."""
    model, (video, padding, *_) = adapted(Mixer(), target_modules=["layers.0", "layers.1"]).train(), padded_pair()
    checkpoint = torch.utils.checkpoint.checkpoint

    def described(x):
        with describe_tokens(~padding):
            return model(x)

    with describe_tokens(~padding):
        output = checkpoint(model, video.requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"inside of the function that is checkpointed"):
        output.sum().backward()
    gradients = []
    for run in (described, lambda x: checkpoint(described, x, use_reentrant=True)):
        model.zero_grad()
        run(video)[~padding].sum().backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "read_" in name])
    torch.testing.assert_close(gradients[1], gradients[0])
