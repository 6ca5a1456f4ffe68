"""`model.forward(...)` gives what a call of the model gives: libraries call it, and hooks don't see it."""

import copy
import io

import pytest
import torch
from generators import CACHE, empty_cache, generator, random_ids
from helpers import CLOSE, EXACT, adapted, batch_of, enable_checkpointing, result, states, strengthen
from models import FAMILIES, base_model
from peft import get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peft_read import ReadConfig, describe_tokens


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
@pytest.mark.parametrize(
    ("family", "padding"), [("bert", "left"), ("bart", "right"), ("t5", "left"), ("gpt2", "holes"), ("clip", "left")]
)
@torch.no_grad()
def test_padding(family, padding, cell):
    """The mask counts, in every model inside as well."""
    model, batch = adapted(family, cell=cell), batch_of(family, padding=padding)
    called, forwarded = (model.get_base_model()(**batch), model.get_base_model().forward(**batch))
    for part in FAMILIES[family].parts.values():
        torch.testing.assert_close(part(forwarded), part(called), **EXACT)


@torch.no_grad()
def test_a_cache():
    """It is continued and filled, the model's own as well."""
    model, ids = generator("llama").get_base_model(), random_ids(2, 9)
    whole = model(input_ids=ids, use_cache=False).logits
    cache = getattr(model.forward(input_ids=ids[:, :4], use_cache=True), CACHE)
    logits = model.forward(input_ids=ids[:, 4:], **{CACHE: cache}).logits
    torch.testing.assert_close(logits, whole[:, 4:], rtol=0, atol=1e-5)
    inner, cache = model.model, empty_cache("llama", generator("llama"))
    states = [inner.forward(input_ids=ids[:, cut], **{CACHE: cache})[0] for cut in (slice(5), slice(5, 9))]
    torch.testing.assert_close(model.lm_head(torch.cat(states, 1)), whole, rtol=0, atol=1e-5)


def test_gradients_and_checkpointing():
    """Of a direct forward those of a call, with checkpoints that compute it again."""
    gradients = []
    for forward, checkpoints in ((False, False), (True, False), (True, True)):
        model, batch = adapted("bert", cell="gru").train(), batch_of("bert", padding="left")
        base = model.get_base_model()
        if checkpoints:
            enable_checkpointing(base)
        output = (base.forward if forward else base)(**batch).last_hidden_state
        output[batch["attention_mask"].bool()][:, :3].sum().backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "read_" in name])
    for other in gradients[1:]:
        for actual, expected in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def replica(model):
    """As `nn.DataParallel` makes it for another device."""
    return model._replicate_for_data_parallel()


@pytest.mark.parametrize("copied", [copy.deepcopy, through_torch_save, replica])
@torch.no_grad()
def test_copies(copied):
    """They go on alone."""
    base, batch = adapted("bert", cell="gru").get_base_model(), batch_of("bert", padding="left")
    expected = base(**batch).last_hidden_state
    torch.testing.assert_close(copied(base).forward(**batch).last_hidden_state, expected, **EXACT)


@torch.no_grad()
def test_an_error_is_forgotten():
    """Whatever ends a direct forward, the next one is right."""
    model = adapted("bert", cell="gru")
    base, batch = model.get_base_model(), batch_of("bert", padding="left")
    expected = result("bert", model, batch)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = base.encoder.layer[1].register_forward_pre_hook(interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            base.forward(**batch)
    handle.remove()
    layer = base.encoder.layer[0].output.dense
    assert layer.context.running() is None
    states = base.forward(**batch).last_hidden_state[batch["attention_mask"].bool()]
    torch.testing.assert_close(states.flatten(), expected, **EXACT)


@torch.no_grad()
def test_a_forward_that_nothing_sees_is_refused():
    """Somebody else's, in the place of the class's since before the adapter came, and called directly."""
    base, batch = base_model("bert"), batch_of("bert", padding="left")
    original = base.forward
    base.forward = lambda **kwargs: original(**kwargs)
    model = get_peft_model(base, ReadConfig(r=4, cell="gru"))
    assert states("bert", model, batch)["text"].isfinite().all()  # a call is seen
    type(base).forward, ours = type(base).forward.__wrapped__, type(base).forward
    try:
        with pytest.raises(RuntimeError, match="outside of a call of its model"):
            base.forward(**batch)
    finally:
        type(base).forward = ours


def tokenizer(folder):
    """Words by number."""
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1} | {str(i): i for i in range(2, 50)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def test_sentence_transformers(tmp_path):
    """It calls the forward directly: each sentence of a padded batch gets what it gets alone."""
    base_model("bert").save_pretrained(tmp_path)
    tokenizer(tmp_path)
    transformer = modules.Transformer(str(tmp_path))
    model = SentenceTransformer(modules=[transformer, modules.Pooling(32, "mean")], device="cpu")
    adapter = adapted("bert", cell="gru")
    adapter.save_pretrained(tmp_path / "adapter")
    model.load_adapter(str(tmp_path / "adapter"))
    sentences = ["3 4 5 6 7 8 9", "10 11", "12 13 14"]
    together = model.encode(sentences, convert_to_tensor=True, batch_size=3)
    alone = torch.stack([model.encode([s], convert_to_tensor=True)[0] for s in sentences])
    torch.testing.assert_close(together, alone, **CLOSE)
    parts = [modules.Transformer(str(tmp_path)), modules.Pooling(32, "mean")]
    plain = SentenceTransformer(modules=parts, device="cpu")
    assert (plain.encode(sentences, convert_to_tensor=True) - together).abs().max() > 1e-2


class Scorer(nn.Module):
    """A model of one's own, whose mask has a name of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, video, video_mask=None):
        for layer in self.layers:
            video = video + torch.relu(layer(video))
        return video


def test_a_model_of_ones_own():
    """Its direct forward is a call as well; the same words about its masks."""
    torch.manual_seed(0)
    model = strengthen(get_peft_model(Scorer(), ReadConfig(r=4, target_modules=["layers.0", "layers.1"])))
    video, mask = torch.randn(2, 5, 8), torch.ones(2, 5)
    mask[1, :2] = 0
    with describe_tokens(mask):
        output = model.get_base_model().forward(video, mask)
    with describe_tokens():
        alone = model.get_base_model().forward(video[1:, 2:], mask[1:, 2:])
    torch.testing.assert_close(output[1:, 2:], alone, **CLOSE)
    with pytest.warns(UserWarning, match="takes all tokens as valid, but the model was given video_mask"):
        model.get_base_model().forward(video, mask)
