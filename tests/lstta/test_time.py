"""Pictures and sound at the same second: the plan of windows against its definition, and from files to the plan."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from lstta_models import strengthen
from media_files import tone, write
from peft import get_peft_model
from test_trimodal_processor import images, tokenizer
from transformers import ASTFeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
from trimodal_families import BATCH, FRAMES, frame_inputs, sound_inputs, tower

from peft_read import LsttaConfig, TrimodalForSequenceClassification, TrimodalModel, TrimodalProcessor
from peft_read.lockstep import TowerBatch
from peft_read.lstta import exchange
from peft_read.lstta.clock import BLOCK
from peft_read.lstta.windows import plan_windows
from peft_read.trimodal.towers import sound_steps


pytestmark = pytest.mark.filterwarnings("ignore:.*(torchvision|torchaudio|mel filter).*")
CPU = torch.device("cpu")
AUDIO_WINDOWS = 3


def frame_by_definition(spans, valid, second):
    """The frame that is shown at a second, the last one that began; `"before"` or `"after"` all of them."""
    real = [index for index, there in enumerate(valid) if there]
    begin, end = min(spans[i][0] for i in real), max(spans[i][1] for i in real)
    if second < begin - BLOCK:
        return "before"
    if second >= end + BLOCK:
        return "after"
    return max([i for i in real if spans[i][0] <= second], default=real[0])


@st.composite
def clips(draw):
    """Frames with gaps, sound that begins and ends anywhere, both with padding."""
    frames = draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(1, 6), min_size=2 * frames, max_size=2 * frames))
    spans, second = [], draw(st.integers(0, 8)) / 4
    for shown, gap in zip(lengths[::2], lengths[1::2], strict=True):
        spans.append((second, second + shown / 4))
        second += (shown + (gap if gap > 4 else 0)) / 4
    valid = draw(st.lists(st.booleans(), min_size=frames, max_size=frames))
    valid[draw(st.integers(0, frames - 1))] = True
    start, steps = draw(st.integers(0, 20)) / 4, draw(st.integers(1, 30))
    return spans, valid, start, steps, draw(st.integers(1, steps))


@settings(max_examples=150, deadline=None)
@given(clips(), st.integers(1, 3))
def test_sound_meets_the_frame_that_is_shown(clip, window):
    spans, valid, start, steps, heard = clip
    middles = start + 0.31 * (torch.arange(steps) + 0.5)  # never on a border, where rounding decides
    sound = torch.stack([middles - 0.155, middles + 0.155], -1)
    real = torch.arange(steps) < heard
    plan = plan_windows(
        {"vision": len(spans), "audio": steps},
        {"vision": torch.tensor([valid]), "audio": real[None]},
        batch=1,
        window=window,
        num_audio_windows=AUDIO_WINDOWS,
        device=CPU,
        times={"vision": torch.tensor([spans]), "audio": sound[None]},
    )
    first = valid.index(True)
    placed = {"vision": {}, "audio": {}}
    for name, where in placed.items():
        taken = plan.steps[name]
        for number in range(plan.count):
            for place in range(taken.take.shape[2]):
                if taken.filled[0, number, place]:
                    assert int(taken.take[0, number, place]) not in where
                    where[int(taken.take[0, number, place])] = number
    assert set(placed["vision"]) == {i for i, there in enumerate(valid) if there}
    assert set(placed["audio"]) == set(range(heard))
    for frame, number in placed["vision"].items():
        assert number == (frame - first) // window
    with_frames = set(placed["vision"].values())
    beside = {"before": [], "after": []}
    for step, number in placed["audio"].items():
        shown = frame_by_definition(spans, valid, float(middles[step]))
        if isinstance(shown, str):
            assert number not in with_frames
            beside[shown].append(number)
        else:
            assert number == (shown - first) // window
    for numbers in beside.values():
        assert numbers == sorted(numbers)
        assert len(set(numbers)) <= AUDIO_WINDOWS
    assert not set(beside["before"]) & set(beside["after"])
    weights = plan.weights(None)
    if weights is not None:
        assert weights.sum() == pytest.approx(1.0)
        assert all(weights[0, number] > 0 for number in {*with_frames, *placed["audio"].values()})


def test_a_clip_is_planned_as_it_is_alone():
    """Beside a longer clip, without pictures, without sound."""
    spans = torch.tensor([[[i, i + 1.0] for i in range(4)]] * 3)
    middles = 0.25 + 0.5 * torch.arange(12.0)
    sound = torch.stack([middles - 0.25, middles + 0.25], -1).expand(3, -1, -1)
    vision = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    audio = torch.arange(12) < torch.tensor([[12], [6], [5]])
    options = {"window": 2, "num_audio_windows": AUDIO_WINDOWS, "device": CPU}

    def plan(rows):
        return plan_windows(
            {"vision": 4, "audio": 12},
            {"vision": vision[rows], "audio": audio[rows]},
            batch=len(rows),
            times={"vision": spans[rows], "audio": sound[rows]},
            **options,
        )

    def groups(plan, row):
        taken = plan.steps["audio"]
        windows = [taken.take[row, w][taken.filled[row, w]].tolist() for w in range(plan.count)]
        return [window for window in windows if window]

    together = plan([0, 1, 2])
    for row in range(3):
        assert groups(together, row) == groups(plan([row]), 0)
    assert groups(together, 0) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert groups(together, 1) == [[0, 1, 2, 3], [4, 5]]
    assert groups(together, 2) == [[0, 1], [2], [3, 4]]
    assert together.steps["vision"].position[1, :2].tolist() == [0.25, 0.75]


EXTRACTORS = {
    "ast": lambda: (
        transformers.ASTModel(
            transformers.ASTConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_mel_bins=16
            )
        ),
        ASTFeatureExtractor(num_mel_bins=16),
    ),
    "whisper": lambda: (
        transformers.WhisperModel(
            transformers.WhisperConfig(
                d_model=32,
                encoder_layers=2,
                encoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_layers=1,
                decoder_attention_heads=4,
                decoder_ffn_dim=64,
                num_mel_bins=16,
                vocab_size=60,
                pad_token_id=0,
            )
        ).encoder,
        WhisperFeatureExtractor(feature_size=16),
    ),
    "wav2vec2": lambda: (tower("wav2vec2"), Wav2Vec2FeatureExtractor(return_attention_mask=True)),
}


def meetings(monkeypatch, path, kind, frames=8, window=1):
    """For each window with frames, the seconds of these and of the sound that they meet."""
    audio, extractor = EXTRACTORS[kind]()
    model = TrimodalForSequenceClassification.from_pretrained_towers(tower("vit"), audio, tower("bert"))
    model = get_peft_model(model, LsttaConfig(r=8, num_heads=2, window=window))
    processor = TrimodalProcessor(images(), extractor, tokenizer(), num_frames=frames)
    plans, times = [], []

    def spy(steps, masks, **options):
        plans.append(plan_windows(steps, masks, **options))
        times.append(options["times"])
        return plans[-1]

    monkeypatch.setattr(exchange, "plan_windows", spy)
    with torch.no_grad():
        model(**processor(videos=[path], audio="videos", text=["heard"]))
    (plan,) = plans[:1]
    seconds = {name: each[0].mean(-1) for name, each in times[0].items()}
    met = []
    for number in range(plan.count):
        here = {n: seconds[n][s.take[0, number][s.filled[0, number]]].tolist() for n, s in plan.steps.items()}
        if here["vision"]:
            met.append((here["vision"], here["audio"]))
    return met


@pytest.mark.parametrize("kind", ["ast", "whisper"])
def test_a_minute_is_heard_in_segments(kind, monkeypatch, tmp_path):
    """The frame at 56 s meets the sound of 56 s, though the tower hears 10 or 30 s at once."""
    path = write(tmp_path / "long.mp4", length=60.0, fps=2, sound=tone(60.0, [(30, 31)]))
    met = meetings(monkeypatch, path, kind)
    assert len(met) == 8
    for number, (frames, heard) in enumerate(met):
        assert frames == [pytest.approx(7.5 * number + 3.75, abs=0.1)]
        assert min(heard) == pytest.approx(7.5 * number, abs=0.3)
        assert max(heard) == pytest.approx(7.5 * (number + 1), abs=0.3)


def test_longer_shorter_and_late_sound(monkeypatch, tmp_path):
    """By time stamps: nothing is stretched, and frames without sound meet none."""
    sounds = {"longer": (8.0, 0.0), "shorter": (1.0, 0.0), "late": (2.0, 2.0)}
    for name, (length, start) in sounds.items():
        path = write(tmp_path / f"{name}.mkv", sound=tone(length, []), sound_start=start)
        for frames, heard in meetings(monkeypatch, path, "wav2vec2"):
            (second,) = frames
            if start + 0.3 < second < start + length - 0.3:
                assert min(heard) == pytest.approx(second - 0.25, abs=0.05)
                assert max(heard) == pytest.approx(second + 0.25, abs=0.16)
            elif not start - 0.5 < second < start + length + 0.5:
                assert not heard


def inputs_of(batch=BATCH):
    spans = torch.stack([torch.arange(FRAMES) / 2, torch.arange(1, FRAMES + 1) / 2], -1)
    return frame_inputs(batch) | {"frame_times": spans.expand(batch, -1, -1)}


def model_of(audio):
    torch.manual_seed(0)
    model = TrimodalModel.from_pretrained_towers(tower("vit"), tower(audio), projection_dim=8)
    return strengthen(get_peft_model(model, LsttaConfig(r=8, num_heads=2, window=1))).eval()


@pytest.mark.parametrize("audio", ["ast", "wav2vec2", "whisper", "clap_audio", "qwen2_audio"])
@torch.no_grad()
def test_a_segment_that_is_all_padding_changes_nothing(audio):
    """A clip is beside a longer one what it is alone, whatever is in the segments that it doesn't have."""
    model = model_of(audio)
    ((name, sound),) = sound_inputs(audio).items()
    count = sound_steps(model.audio_model, sound)
    alone = inputs_of() | {name: sound, "audio_times": torch.tensor([[0.0, 2.0 / count]] * BATCH)}
    alone["audio_mask"] = torch.ones(BATCH, count, dtype=torch.long)
    expected = model(**alone).pooler_output
    filled = torch.stack([sound, torch.full_like(sound, 3.0)], 1)
    masks = torch.stack([alone["audio_mask"], torch.zeros(BATCH, count, dtype=torch.long)], 1)
    times = torch.stack([alone["audio_times"], alone["audio_times"] + torch.tensor([2.0, 0.0])], 1)
    together = inputs_of() | {name: filled, "audio_mask": masks, "audio_times": times}
    torch.testing.assert_close(model(**together).pooler_output, expected, rtol=0, atol=1e-5)
    together["audio_mask"][:, 1] = 1
    assert (model(**together).pooler_output - expected).abs().max() > 1e-3


@torch.no_grad()
def test_the_clock_changes_who_meets():
    """The same pictures and sound at other seconds are another clip; a clock that starts elsewhere is the same one."""
    model = model_of("wav2vec2")
    sound = sound_inputs("wav2vec2")
    times = torch.tensor([[0.0, 2.0 / sound["input_values"].shape[1]]] * BATCH)
    given = inputs_of() | sound
    without = model(**{k: v for k, v in given.items() if k != "frame_times"}).pooler_output
    together = model(**given, audio_times=times).pooler_output
    torch.testing.assert_close(together, without, rtol=0, atol=1e-5)
    later = model(**given, audio_times=times + torch.tensor([1.0, 0.0])).pooler_output
    assert (later - together).abs().max() > 1e-3
    moved = given | {"frame_times": given["frame_times"] + 100}
    again = model(**moved, audio_times=times + torch.tensor([100.0, 0.0])).pooler_output
    torch.testing.assert_close(again, together, rtol=0, atol=1e-4)


def test_tubelets_last_as_long_as_their_frames():
    """And padding in a tubelet has no time."""
    spans = torch.tensor([[[0.0, 1], [1, 2], [2, 3], [9, 9]], [[0.0, 2], [2, 4], [4, 6], [6, 8]]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    batch = TowerBatch.of("vision", tower("videomae"), 2, 4, mask, spans)
    assert batch.step_times(2).tolist() == [[[0, 2], [2, 3]], [[0, 4], [4, 8]]]


def test_times_that_do_not_fit_are_refused():
    model = model_of("wav2vec2")
    given = inputs_of() | sound_inputs("wav2vec2")
    with pytest.raises(ValueError, match="Give both `frame_times` and `audio_times`, or neither"):
        model(**given)
    with pytest.raises(ValueError, match=r"times of the audio tower have the shape \(2, 1, 3\), expected \(2, 1, 2\)"):
        model(**given, audio_times=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"times of the vision tower have the shape \(2, 4\), expected \(2, 4, 2\)"):
        model(**given | {"frame_times": torch.zeros(2, 4)}, audio_times=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="too coarse for seconds"):
        model(**given | {"frame_times": given["frame_times"].bfloat16()}, audio_times=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="Only sound can be given in segments"):
        TowerBatch.of("vision", tower("vit"), 2, 4, segments=2)
