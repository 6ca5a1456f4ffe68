"""A composite model of one's own, of tiny towers, made by the documented helper, and what LSTTA's tests feed it."""

import copy
import inspect

import torch
from peft import get_peft_model
from torch import nn
from trimodal_families import BATCH, FAMILIES, FRAMES, IMAGE, SOUNDS, VOCAB, WIDTH, tower

from peft_read import LsttaConfig
from peft_read.lockstep import LockstepBatch, TowerBatch, run_towers
from peft_read.lockstep.layouts import takes_videos
from peft_read.lstta.layer import LsttaLayer


USUAL = ("vit", "wav2vec2", "bert")
EXACT = {"rtol": 0, "atol": 0}
# States are around 1; kernels round differently for batches of another shape.
CLOSE = {"rtol": 0, "atol": 1e-4}


class Composite(nn.Module):
    """Towers and a head on the means of their last states."""

    make_exchange = None

    def __init__(self, **towers):
        super().__init__()
        self.vision_model, self.audio_model, self.text_model = (
            towers.get(modality) for modality in ("vision", "audio", "text")
        )
        self.classifier = nn.Linear(WIDTH, 3)

    def forward(
        self,
        pixel_values=None,
        sound=None,
        input_ids=None,
        attention_mask=None,
        frame_mask=None,
        audio_mask=None,
        **options,
    ):
        size = len(next(x for x in (pixel_values, sound, input_ids) if x is not None))
        calls, towers = {}, {}
        if pixel_values is not None:
            towers["vision"] = TowerBatch.of("vision", self.vision_model, size, pixel_values.shape[1], frame_mask)
            frames = pixel_values if takes_videos(self.vision_model) else pixel_values.flatten(0, 1)
            calls["vision"] = lambda: self.vision_model(frames, **options)
        if sound is not None:
            name = self.audio_model.main_input_name
            towers["audio"] = TowerBatch.of("audio", self.audio_model, size, self.sound_steps(sound), audio_mask)
            mask = {"attention_mask": audio_mask} if self.sound_is_masked and audio_mask is not None else {}
            calls["audio"] = lambda: self.audio_model(**{name: sound}, **mask, **options)
        if input_ids is not None:
            towers["text"] = TowerBatch.of("text", self.text_model, size, input_ids.shape[1], attention_mask)
            calls["text"] = lambda: self.text_model(input_ids, attention_mask=attention_mask, **options)
        outputs = run_towers(self, calls, LockstepBatch(size, towers))
        means = [
            states.reshape(size, -1, states.shape[-1]).mean(1)
            for states in (output.last_hidden_state for output in outputs.values())
            if states.shape[-1] == WIDTH
        ]
        return outputs | {"logits": self.classifier(sum(means))}

    @property
    def sound_is_masked(self):
        """Whether the tower takes a mask over its input; that of others is over tokens."""
        known = inspect.signature(self.audio_model.forward).parameters
        others = ("audio-spectrogram-transformer", "qwen2_audio_encoder", "whisper")
        return "attention_mask" in known and self.audio_model.config.model_type not in others

    def sound_steps(self, sound):
        """The axis of time of each kind of input: samples, or frames of a spectrogram."""
        mels_first = self.audio_model.config.model_type in ("whisper", "qwen2_audio_encoder")
        return sound.shape[2 if mels_first or sound.ndim == 4 else 1]


def composite(families=USUAL, depths=None):
    """A composite of one tower of each family, always with the same weights; `depths` of the usual three."""
    towers = {FAMILIES[family].modality: tower(family) for family in families}
    for modality, depth in (depths or {}).items():
        config = copy.deepcopy(towers[modality].config)
        config.num_hidden_layers = depth
        torch.manual_seed(0)
        towers[modality] = type(towers[modality])(config).requires_grad_(False)
    torch.manual_seed(0)
    return Composite(**towers).eval()


def batch_of(families=USUAL, batch=BATCH, seed=0):
    """Random inputs for towers of these families."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for family in families:
        modality = FAMILIES[family].modality
        if modality == "vision":
            inputs["pixel_values"] = torch.randn(batch, FRAMES, 3, IMAGE, IMAGE, generator=generator)
        elif modality == "audio":
            inputs["sound"] = torch.randn(batch, *SOUNDS[FAMILIES[family].inputs][1], generator=generator)
        else:
            inputs["input_ids"] = torch.randint(5, VOCAB, (batch, 9), generator=generator)
            inputs["attention_mask"] = torch.ones(batch, 9, dtype=torch.long)
    return inputs


@torch.no_grad()
def strengthen(model, adapter_name="default", seed=0):
    """Give an adapter weights under which a wrong message shows in every output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter_parameters(model, adapter_name).items():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(values * 0.3 if parameter.ndim == 1 else values * parameter.shape[-1] ** -0.5)
        if "upward" in name:
            parameter.mul_(0.5)
    return model


def adapter_parameters(model, adapter_name="default"):
    return {name: p for name, p in model.named_parameters() if f".lstta_adapter.{adapter_name}." in name}


def adapted(families=USUAL, base=None, strong=True, **options):
    """A composite with an adapter whose weights act, in eval mode."""
    base = composite(families) if base is None else base
    model = get_peft_model(base, LsttaConfig(**{"r": 8, "num_heads": 2, "window": 2} | options)).eval()
    return strengthen(model) if strong else model


def states_of(outputs):
    """What a forward gives, by tower, and the logits."""
    return {k: v if k == "logits" else v.last_hidden_state for k, v in outputs.items()}


@torch.no_grad()
def result(model, inputs):
    return states_of(model(**copy.copy(inputs)))


def assert_same(got, wanted, towers=None, **tolerance):
    for name in wanted if towers is None else towers:
        torch.testing.assert_close(got[name], wanted[name], **(tolerance or EXACT), msg=lambda m, n=name: f"{n}: {m}")


def assert_other(got, wanted, towers=None):
    for name in wanted if towers is None else towers:
        assert (got[name] - wanted[name]).abs().max() > 1e-3, name


INPUTS = batch_of()
TOWERS = ("vision", "audio", "text")


def blocks_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, LsttaLayer)]


def two_adapters(**options):
    model = adapted()
    model.add_adapter("second", LsttaConfig(**{"r": 12, "num_heads": 3, "window": 1} | options))
    return strengthen(model, "second", seed=1)
