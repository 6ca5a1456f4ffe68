"""`pipeline("text-generation")` with batches of prompts of different lengths."""

import pytest
from generators import NEW_TOKENS, generator
from models import VOCAB
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, PreTrainedTokenizerFast, pipeline


PROMPTS = ["w3 w4 w5 w6 w7 w8", "w9", "w10 w11 w12", "w13 w14", "w15 w16 w17 w18 w19"]


def tokenizer():
    words = Tokenizer(WordLevel({"[PAD]": 0} | {f"w{i}": i for i in range(1, VOCAB)}, unk_token="w1"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", padding_side="left")


def texts(model, use_cache=True, **options):
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, use_cache=use_cache)
    return [row[0]["generated_text"] for row in generate(PROMPTS, generation_config=config, **options)]


@pytest.mark.parametrize("through_peft", [True, False], ids=["PeftModel", "base"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_batch_size_changes_nothing(family, through_peft):
    """Prompts are padded to the longest of their batch; each is continued as alone, and without a cache."""
    model = generator(family)
    model = model if through_peft else model.get_base_model()
    alone = texts(model)
    assert all(text.startswith(prompt) for text, prompt in zip(alone, PROMPTS, strict=True))
    assert texts(model, batch_size=3) == alone
    assert texts(model, use_cache=False, batch_size=5) == alone
