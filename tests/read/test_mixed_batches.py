"""Inference with an adapter per sample (`adapter_names`), which PEFT drops silently unless the tuner takes it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import CLOSE, LENGTHS, adapted, batch_of, images, result, states, strengthen
from models import FAMILIES, base_model, classifier
from peft import get_peft_model

from peft_read import ReadConfig


NAMES = ["second", "__base__", "default"]


def with_second(model, **options):
    model.add_adapter("second", ReadConfig(**{"r": 6, "cell": "lstm"} | options))
    return strengthen(model, seed=1, adapter_name="second").eval()


def each_alone(call, model, names):
    """What `call(model)` gives with each adapter active for the whole batch."""
    results = {}
    for name in names:
        if name == "__base__":
            with model.disable_adapter():
                results[name] = call(model)
        else:
            model.set_adapter(name)
            results[name] = call(model)
    model.set_adapter("default")
    return results


@pytest.mark.parametrize("family", ["bert", "bart", "t5", "llama", "clip"])
@pytest.mark.parametrize("names", [NAMES, ["default"] * 3, ["__base__"] * 3, ["second", "default", "second"]])
@torch.no_grad()
def test_each_row_has_its_own_adapter(family, names):
    """Row by row as if that adapter were active for the whole batch, padding included."""
    padding = FAMILIES[family].paddings[0]
    batch, model = batch_of(family, padding=padding), with_second(adapted(family, cell="gru"))
    alone = each_alone(lambda m: states(family, m, batch), model, set(names))
    mixed = states(family, model, batch | {"adapter_names": names})
    valid = batch["attention_mask"].bool()
    for kind, tokens in mixed.items():
        for row, name in enumerate(names):
            keep = slice(None) if kind == "image" else valid[row]
            torch.testing.assert_close(tokens[row][keep], alone[name][kind][row][keep], **CLOSE)


@torch.no_grad()
def test_adapters_on_different_layers():
    """A row whose adapter a layer doesn't have passes through that layer as it is."""
    batch = batch_of("bert")
    model = with_second(adapted("bert", layers_to_transform=[0]), layers_to_transform=[1])
    alone = each_alone(lambda m: states("bert", m, batch)["text"], model, NAMES)
    mixed = states("bert", model, batch | {"adapter_names": NAMES})["text"]
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row, : LENGTHS[row]], alone[name][row, : LENGTHS[row]], **CLOSE)


@torch.no_grad()
def test_heads_go_with_their_adapters():
    """Modules that are saved with an adapter are chosen row by row as well."""
    batch = batch_of("bert")
    model = get_peft_model(classifier(), ReadConfig(r=4, cell="gru", task_type="SEQ_CLS"))
    model = with_second(strengthen(model), task_type="SEQ_CLS")
    torch.nn.init.normal_(model.base_model.model.classifier.modules_to_save["second"].weight)
    alone = each_alone(lambda m: m(**batch).logits, model, NAMES)
    mixed = model(**batch, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], alone[name][row], **CLOSE)


@torch.no_grad()
def test_a_name_per_video():
    """Where time runs over frames, a name goes for all frames of a video, and one per frame does as well."""
    frames = 2
    options = {"recur_over": "frames", "num_frames": frames}
    model = with_second(adapted("vit", cell="gru", **options), **options)
    batch = {"pixel_values": images(frames * len(NAMES))}
    alone = each_alone(lambda m: states("vit", m, batch)["image"], model, NAMES)
    expected = torch.cat([alone[name][frames * i : frames * (i + 1)] for i, name in enumerate(NAMES)])
    for names in (NAMES, [name for name in NAMES for _ in range(frames)]):
        mixed = states("vit", model, batch | {"adapter_names": names})["image"]
        torch.testing.assert_close(mixed, expected, **CLOSE)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation(family, num_beams):
    """Each prompt is continued with its own adapter, also where it has several beams."""
    model = with_second(adapted(family, cell="gru"))
    batch = {k: v for k, v in batch_of(family, padding="left", lengths=(6, 6, 6)).items() if k != "position_ids"}
    options = {
        "max_new_tokens": 6,
        "use_cache": False,
        "do_sample": False,
        "num_beams": num_beams,
        "output_logits": num_beams == 1,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    alone = each_alone(lambda m: m.generate(**batch, **options), model, NAMES)
    mixed = model.generate(**batch, **options, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        assert torch.equal(mixed.sequences[row], alone[name].sequences[row])
        if num_beams > 1:
            torch.testing.assert_close(mixed.sequences_scores[row], alone[name].sequences_scores[row], **CLOSE)
        else:
            for step, expected in zip(mixed.logits, alone[name].logits, strict=True):
                torch.testing.assert_close(step[row], expected[row], rtol=0, atol=1e-4)


@pytest.mark.parametrize("names", [["default", "typo", "second"], ["default", "", "second"]])
def test_unknown_names_are_refused(names):
    """A name that isn't there would be the base model, silently."""
    model = with_second(adapted("bert"))
    with pytest.raises(ValueError, match=r"adapters that aren't there.*'default', 'second'"):
        model(**batch_of("bert"), adapter_names=names)


@pytest.mark.parametrize("names", [["default", "second"], ["default"] * 4, ["default"], []])
def test_a_wrong_number_of_names_is_refused(names):
    """There has to be a name for each sample; one for several rows is for their beams or frames, and here are none."""
    model = with_second(adapted("bert"))
    with pytest.raises(ValueError, match=f"one adapter per sample: got {len(names)} names for 3"):
        model(**batch_of("bert"), adapter_names=names)


def test_training_is_refused():
    """As with PEFT's own methods: which adapter's weights are trained isn't a matter of rows."""
    with pytest.raises(ValueError, match=r"model\.eval"):
        with_second(adapted("bert")).train()(**batch_of("bert"), adapter_names=NAMES)


def test_nothing_is_left_after_an_error():
    """A refused call leaves no hook that would give its names to the next one."""
    model, batch = with_second(adapted("bert")), batch_of("bert")
    before = result("bert", model, batch)
    with pytest.raises(ValueError, match="one adapter per sample"):
        model(**batch, adapter_names=["second", "second"])
    assert torch.equal(result("bert", model, batch), before)
    assert not any(module._forward_pre_hooks for module in model.modules() if hasattr(module, "read_upward"))


@torch.no_grad()
def test_disabled_adapters_take_no_names():
    """`disable_adapter` wins over names, as in PEFT."""
    model, batch = with_second(adapted("bert")), batch_of("bert")
    with model.disable_adapter():
        actual = states("bert", model, batch | {"adapter_names": NAMES})["text"]
    torch.testing.assert_close(actual, states("bert", base_model("bert"), batch)["text"], **CLOSE)


def test_threads_have_names_of_their_own():
    """Requests that run at the same time with other names, or none, don't get each other's."""
    model, batch = with_second(adapted("bert")), batch_of("bert", lengths=(6, 6, 6))
    choices = [NAMES, NAMES[::-1], ["default"] * 3, ["second"] * 3, None]

    @torch.no_grad()
    def run(names):
        given = {} if names is None else {"adapter_names": names}
        return states("bert", model, batch | given)["text"]

    expected = [run(names) for names in choices]
    with ThreadPoolExecutor(len(choices)) as pool:
        for _ in range(20):
            for actual, value in zip(pool.map(run, choices), expected, strict=True):
                torch.testing.assert_close(actual, value, **CLOSE)
