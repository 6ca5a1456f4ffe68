"""What LSTTA promises holds in towers of every family; one tower varied at a time, and pairs."""

import pytest
import torch
from lstta_models import (
    CLOSE,
    adapted,
    adapter_parameters,
    assert_other,
    assert_same,
    batch_of,
    composite,
    result,
    strengthen,
)
from peft import PeftModel
from trimodal_families import AUDIO, BATCH, FAMILIES, FRAMES, TEXT, VISION, tower

from peft_read.lockstep.layouts import takes_videos
from peft_read.lstta.layer import LsttaLayer


# How transformers before 5.23 defines functions of DeBERTa.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def towers_around(family):
    """A family's tower with usual ones of the other modalities."""
    usual = {"vision": "vit", "audio": "ast", "text": "bert"} | {FAMILIES[family].modality: family}
    return tuple(usual.values())


VARIED = [*VISION, *AUDIO, *TEXT]
PAIRS = [
    ("swin", "wav2vec2"),
    ("videomae", "whisper"),
    ("timesformer", "albert"),
    ("siglip_vision", "modernbert"),
    ("clap_audio", "longformer"),
    ("ast", "funnel"),
    ("wavlm", "deberta_v2"),
]
CASES = {f: (towers_around(f), FAMILIES[f].modality) for f in VARIED}
CASES |= {"+".join(pair): (pair, FAMILIES[pair[0]].modality) for pair in PAIRS}
# A missing modality leaves the other two to interact; a pair would leave one.
TRIPLES = VARIED


class Case:
    """A model of one case: what it gave at the start, then adapted by strong weights."""

    def __init__(self, name):
        self.families, self.varied = CASES[name]
        self.modalities = [FAMILIES[family].modality for family in self.families]
        self.others = [modality for modality in self.modalities if modality != self.varied]
        self.inputs = batch_of(self.families)
        base = composite(self.families)
        self.base_result = result(base, self.inputs)
        self.model = adapted(base=base, strong=False)
        self.first_result = result(self.model, self.inputs)
        strengthen(self.model)
        self.result = result(self.model, self.inputs)


@pytest.fixture(scope="module")
def case(request):
    """Tests of one case follow each other."""
    return Case(request.param)


each_case = pytest.mark.parametrize("case", list(CASES), indirect=True)
each_triple = pytest.mark.parametrize("case", TRIPLES, indirect=True)


@each_case
def test_base_is_kept(case):
    """New adapters and disabled ones give the base model bit for bit; with weights they act on all towers."""
    assert_same(case.first_result, case.base_result)
    assert_other(case.result, case.base_result, case.modalities)
    with case.model.disable_adapter():
        assert_same(result(case.model, case.inputs), case.base_result)


@each_case
def test_trains_saves_and_loads(case, tmp_path):
    """Every adapter weight gets a gradient and no other does; what is saved gives the same when it is loaded."""
    outputs = case.model(**case.inputs)
    sum(outputs[tower].last_hidden_state.square().mean() for tower in case.modalities).backward()
    ours = adapter_parameters(case.model)
    assert {name for name, p in case.model.named_parameters() if p.grad is not None} == set(ours)
    assert all(p.grad.abs().max() > 0 for p in ours.values())
    case.model.zero_grad()
    case.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(composite(case.families), tmp_path, adapter_name="again")
    assert_same(result(loaded, case.inputs), case.result)


@each_case
def test_an_error_in_a_tower(case):
    """It goes to the caller with the tower's name, and leaves nothing half done."""
    layers = [m for m in case.model.modules() if isinstance(m, LsttaLayer) and m.modality == case.varied]

    def fail(*_):
        raise RuntimeError("broken")

    handle = layers[-1].base_layer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken") as caught:
        case.model(**case.inputs)
    assert any(f"{case.varied} tower" in note for note in caught.value.__notes__)
    handle.remove()
    assert_same(result(case.model, case.inputs), case.result)


KEYS = {"vision": ("pixel_values",), "audio": ("sound",), "text": ("input_ids", "attention_mask")}


def mask_for(modality, inputs, model):
    """A mask over a modality's input, all true, and its name."""
    if modality == "vision":
        return "frame_mask", torch.ones(BATCH, FRAMES, dtype=torch.bool)
    if modality == "audio":
        steps = model.get_base_model().sound_steps(inputs["sound"])
        return "audio_mask", torch.ones(BATCH, steps, dtype=torch.bool)
    return "attention_mask", inputs["attention_mask"].clone()


def with_garbage(inputs, modality, places):
    """Other content at the true places of `(batch, steps)`; for sound, in the whole sample where any is true."""
    key = KEYS[modality][0]
    changed = inputs[key].clone()
    if modality == "vision":
        changed[places] += 3
    elif modality == "text":
        changed[places] = 7
    else:
        changed[places.any(1)] += 3
    return inputs | {key: changed}


@each_triple
# WavLM's attention is given a mask and a bias of two types.
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
def test_a_masked_modality_is_a_missing_one(case):
    """Whatever a masked-out input holds, nothing of it goes through the adapters; prefix tokens included."""
    model, inputs = case.model, case.inputs
    name, mask = mask_for(case.varied, inputs, model)
    mask[0] = 0
    masked = result(model, inputs | {name: mask})
    assert all(output.isfinite().all() for output in masked.values())
    garbage = result(model, with_garbage(inputs, case.varied, ~mask.bool()) | {name: mask})
    assert_same(garbage, masked, case.others, rtol=0, atol=1e-6)
    absent = result(model, {key: value for key, value in inputs.items() if key not in KEYS[case.varied]})
    for other in case.others:
        half = len(absent[other]) // BATCH
        torch.testing.assert_close(masked[other][:half], absent[other][:half], **CLOSE)
        torch.testing.assert_close(masked[other][half:], case.result[other][half:], **CLOSE)


def hides_padding(family):
    """Whether what a tower itself finds at valid places doesn't depend on padding."""
    if FAMILIES[family].modality == "vision":
        # X-CLIP's frames look at each other.
        return not takes_videos(tower(family)) and family != "xclip_vision"
    # Funnel pools words with what is beside them.
    return FAMILIES[family].modality == "text" and family != "funnel"


@pytest.mark.parametrize("case", [f for f in VARIED if hides_padding(f)], indirect=True)
def test_padding_changes_nothing(case):
    """Frames and words behind the valid ones may hold anything."""
    name, mask = mask_for(case.varied, case.inputs, case.model)
    mask[0, mask.shape[1] // 2 :] = 0
    wanted = result(case.model, case.inputs | {name: mask})
    got = result(case.model, with_garbage(case.inputs, case.varied, ~mask.bool()) | {name: mask})
    assert_same(got, wanted, case.others, **CLOSE)
    valid = mask.flatten() if case.varied == "vision" else mask.bool()
    torch.testing.assert_close(got[case.varied][valid], wanted[case.varied][valid], **CLOSE)


@each_case
def test_unloading_gives_the_base(case):
    """Bit for bit. The last test of a case: its model is the base afterwards."""
    assert_same(result(case.model.unload(), case.inputs), case.base_result)
