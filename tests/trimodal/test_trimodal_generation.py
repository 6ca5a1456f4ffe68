"""A model that writes: alone as the language model does, adapted by what is seen and heard, trained by its Trainer."""

import pytest
import torch
import transformers
from lstta_models import strengthen
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments
from trimodal_families import FRAMES, VOCAB, frame_inputs, sound_inputs, text_inputs, tower

from peft_read import FeatureTower, LsttaConfig, TrimodalForConditionalGeneration


SIZES = {"vocab_size": VOCAB, "d_model": 32}
ENCODER_DECODER = SIZES | {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "init_std": 0.5,
    "dropout": 0.0,
}
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
T5 = SIZES | SPECIAL | {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
POSITIONS = {"max_position_embeddings": 64}
PROPHETNET = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
LED = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4}
LANGUAGE_MODELS = {
    "T5ForConditionalGeneration": T5,
    "MT5ForConditionalGeneration": T5,
    "UMT5ForConditionalGeneration": T5,
    "LongT5ForConditionalGeneration": T5,
    "BartForConditionalGeneration": ENCODER_DECODER | POSITIONS,
    "MBartForConditionalGeneration": ENCODER_DECODER | POSITIONS,
    "PegasusForConditionalGeneration": ENCODER_DECODER | POSITIONS,
    "MarianMTModel": ENCODER_DECODER | POSITIONS,
    "BlenderbotForConditionalGeneration": ENCODER_DECODER | POSITIONS,
    "M2M100ForConditionalGeneration": ENCODER_DECODER | POSITIONS,
    "LEDForConditionalGeneration": ENCODER_DECODER | LED,
    "ProphetNetForConditionalGeneration": PROPHETNET | SPECIAL,
}
BEAMS = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}


def language_model(name="T5ForConditionalGeneration"):
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**LANGUAGE_MODELS[name])).eval().requires_grad_(False)


def model_of(name="T5ForConditionalGeneration"):
    return TrimodalForConditionalGeneration.from_pretrained_towers(tower("vit"), tower("ast"), language_model(name))


def adapted(base, **options):
    return strengthen(get_peft_model(base, LsttaConfig(r=8, num_heads=2, **options))).eval()


def inputs_of():
    text = text_inputs()
    text["attention_mask"][1, 6:] = 0
    return frame_inputs() | sound_inputs("ast") | text


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_it_writes_as_the_language_model_and_what_it_is_told(name, tmp_path):
    """Unadapted, by beams and by a loss. Adapted, with its cache as without, rows as they are alone; from a file."""
    alone, base, inputs = language_model(name), model_of(name), inputs_of()
    text, labels = {k: inputs[k] for k in ("input_ids", "attention_mask")}, inputs["input_ids"][:, :4].clone()
    assert torch.equal(base.generate(**inputs, **BEAMS), alone.generate(**text, **BEAMS))
    expected = alone(**text, labels=labels)
    given = base(**inputs, labels=labels)
    assert torch.equal(given.logits, expected.logits)
    assert torch.equal(given.loss, expected.loss)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base)
    assert (model(**inputs, labels=labels).logits - expected.logits).abs().max() > 1e-5
    written = model.generate(**inputs, **BEAMS)
    assert torch.equal(model.generate(**inputs, **BEAMS, use_cache=False), written)
    for row in range(2):
        own = model.generate(**{k: v[row : row + 1] for k, v in inputs.items()}, **BEAMS)[0]
        assert torch.equal(written[row, : len(own)], own)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").requires_grad_(False)
    assert type(loaded) is TrimodalForConditionalGeneration
    assert type(loaded.language_model) is type(alone)
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**inputs, labels=labels).logits, model(**inputs, labels=labels).logits)


@torch.no_grad()
def test_beams_follow_the_adapted_scores():
    """Greedy search by hand, a whole forward for each word; what is written depends on what is seen."""
    model, inputs = adapted(model_of("BartForConditionalGeneration"), scaling=8.0), inputs_of()
    ids = torch.full((2, 1), 2)
    for _ in range(4):
        ids = torch.cat([ids, model(**inputs, decoder_input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    greedy = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, num_beams=1, do_sample=False)
    assert torch.equal(greedy, ids)
    several = model.generate(**inputs, **BEAMS, num_return_sequences=2)
    assert torch.equal(several[::2], model.generate(**inputs, **BEAMS))
    scored = {"return_dict_in_generate": True, "output_scores": True}
    first = model.generate(**inputs, **BEAMS, **scored).sequences_scores
    other = model.generate(**inputs | {"pixel_values": -inputs["pixel_values"]}, **BEAMS, **scored).sequences_scores
    assert (first - other).abs().max() > 1e-3


@torch.no_grad()
def test_towers_run_once_for_all_that_is_written():
    model, calls = adapted(model_of()), []
    model.get_base_model().vision_model.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**inputs_of(), **BEAMS)
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("task_type", [None, "SEQ_2_SEQ_LM"])
def test_its_trainer(task_type, tmp_path):
    """Trains the adapter alone, and predicts what `generate` writes."""
    base, inputs = model_of(), inputs_of()
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, LsttaConfig(r=8, num_heads=2, task_type=task_type))
    data = [{k: v[i] for k, v in inputs.items()} | {"labels": inputs["input_ids"][i, :4]} for i in range(2)]
    arguments = Seq2SeqTrainingArguments(
        tmp_path,
        max_steps=3,
        learning_rate=0.1,
        per_device_train_batch_size=2,
        predict_with_generate=True,
        generation_max_length=6,
        generation_num_beams=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    after = {name.replace("base_layer.", ""): value for name, value in base.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in frozen.items() if name in after)
    predicted = torch.tensor(trainer.predict(data).predictions)
    written = model.eval().generate(**inputs, max_length=6, num_beams=2)
    assert torch.equal(predicted[:, : written.shape[1]], written)
    assert not predicted[:, written.shape[1] :].any()
    trainer.save_model(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: video-text-to-text\n" in card
    assert "a local `T5ForConditionalGeneration` for text" in card


@torch.no_grad()
def test_features_in_the_place_of_towers():
    """Those of pictures, and no sound."""
    base = TrimodalForConditionalGeneration.from_pretrained_towers(
        vision=FeatureTower.of("vision", 12, num_hidden_layers=2), text=language_model()
    )
    features = torch.randn(2, FRAMES, 12, generator=torch.Generator().manual_seed(0))
    model, text = adapted(base), text_inputs()
    first = model(frame_features=features, **text, labels=text["input_ids"]).logits
    other = model(frame_features=-features, **text, labels=text["input_ids"]).logits
    assert (first - other).abs().max() > 1e-4


def test_what_cannot_write_is_refused():
    with pytest.raises(ValueError, match="is no encoder-decoder that generates text"):
        TrimodalForConditionalGeneration.from_pretrained_towers(tower("vit"), text=tower("bert"))
    with pytest.raises(ValueError, match="needs an encoder-decoder that reads and writes"):
        TrimodalForConditionalGeneration.from_pretrained_towers(tower("vit"), tower("ast"))
    model = model_of()
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="There is no text to start from"):
            call(**frame_inputs())
