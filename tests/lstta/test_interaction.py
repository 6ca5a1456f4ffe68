"""LSTTA's mathematics against loops over samples, windows, tokens and heads in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lstta_loops import (
    AUDIO_WINDOWS,
    CLOSE,
    CPU,
    HEADS,
    TIMED,
    WINDOW,
    R,
    make_filter,
    make_streams,
    mask_of,
    naive_log_importance,
    naive_short_term,
    plan,
    steps_in_windows,
)

from peft_read.lstta.interaction import FrameFilter, Stream, interact, short_term_interaction
from peft_read.lstta.windows import plan_windows


TOWERS = [("vision", "audio", "text"), ("vision", "text"), ("audio", "text"), ("vision", "audio")]
FRAMES = ["11111111", "11111000", "01101110"]
SOUND = ["11111111111", "11110000000", "00111111110"]
MASKS = {
    "no padding": {},
    "frames padded": {"vision": mask_of(FRAMES)},
    "sound padded": {"audio": mask_of(SOUND)},
    "both padded": {"vision": mask_of(FRAMES), "audio": mask_of(SOUND)},
    "some clips lack frames or sound": {
        "vision": mask_of(["00000000", "11111111", "11110000"]),
        "audio": mask_of(["11111110000", "00000000000", "11111111111"]),
    },
}
TEXT_MASKS = {"no padding": None, "both padded": mask_of(["11111", "11000", "00111"])}


@pytest.mark.parametrize("towers", TOWERS, ids="+".join)
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("filtered", [True, False], ids=["filter", "no filter"])
def test_equals_the_loops(towers, padding, filtered):
    """Both modules, all combinations of towers, every kind of padding."""
    streams = make_streams(towers, text_mask=TEXT_MASKS.get(padding))
    masks = MASKS[padding]
    frame_filter = make_filter() if filtered else None
    messages, importance = interact(streams, plan(streams, masks), num_heads=HEADS, frame_filter=frame_filter)
    expected_importance = None
    if filtered and "vision" in towers:
        expected_importance = naive_log_importance(frame_filter, streams, masks, 3).exp()
        torch.testing.assert_close(importance, expected_importance, **CLOSE)
    else:
        assert importance is None
    expected = naive_short_term(streams, masks, 3, WINDOW, expected_importance)
    for tower in towers:
        for got, wanted in zip((messages[tower].timed, messages[tower].untimed), expected[tower], strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                torch.testing.assert_close(got, wanted, **CLOSE)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), window=st.integers(1, 5))
def test_every_mask_is_planned_as_the_loops_plan_it(data, window):
    """Windows and times of any masks, holes and left padding included."""
    batch = data.draw(st.integers(1, 3))
    masks = {
        tower: torch.tensor(
            data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=batch, max_size=batch))
        )
        for tower, n in (("vision", data.draw(st.integers(1, 9))), ("audio", data.draw(st.integers(1, 9))))
    }
    steps = {tower: mask.shape[1] for tower, mask in masks.items()}
    windows = plan_windows(steps, masks, batch=batch, window=window, num_audio_windows=AUDIO_WINDOWS, device=CPU)
    for b in range(batch):
        expected = steps_in_windows(masks["vision"][b].tolist(), masks["audio"][b].tolist(), window)
        for tower, planned in windows.steps.items():
            found = {
                (planned.take[b, w, m].item(), w)
                for w in range(windows.count)
                for m in range(planned.take.shape[2])
                if planned.filled[b, w, m]
            }
            assert found == {(t, w) for t, w, _ in expected.get(tower, [])}
            for t, w, time in expected.get(tower, []):
                assert planned.time[b, t].item() == pytest.approx(time)
                assert planned.place[b, t].item() // planned.take.shape[2] == w


# ---------------------------------------------------------------- what follows from the design


def test_a_plan_without_masks_is_the_plan_with_full_masks():
    """Batches without padding take a shorter way to the same windows."""
    streams = make_streams()
    short = plan(streams)
    long = plan(streams, {tower: torch.ones(3, count, dtype=torch.bool) for tower, (count, _) in TIMED.items()})
    assert short.count == long.count
    for tower in TIMED:
        for name, value in vars(short.steps[tower]).items():
            assert torch.equal(value, getattr(long.steps[tower], name)), (tower, name)


@pytest.mark.parametrize("frame", [0, 4, 7])
def test_importance_to_zero_is_masking(frame):
    """g -> 0 takes a frame away as key, as query and from the windows' weights."""
    streams = make_streams()
    gone = torch.ones(3, 8, dtype=torch.bool)
    gone[:, frame] = False
    # The clip keeps its extent, which a mask at its border would change.
    windows = plan(streams)
    vision = windows.steps["vision"]
    log_importance = torch.zeros(3, 8, dtype=torch.float64).masked_fill(~gone, -60.0)
    faded = short_term_interaction(streams, windows, num_heads=HEADS, log_importance=log_importance)
    hidden = type(windows)(
        WINDOW,
        windows.count,
        windows.steps
        | {"vision": type(vision)(**vars(vision) | {"valid": gone, "filled": vision.filled & vision.split(gone)})},
    )
    masked = short_term_interaction(streams, hidden, num_heads=HEADS)
    untouched = short_term_interaction(streams, windows, num_heads=HEADS)
    for tower in streams:
        for name in ("timed", "untimed"):
            got, wanted = getattr(faded[tower], name), getattr(masked[tower], name)
            if got is not None:
                torch.testing.assert_close(got, wanted, **CLOSE)
                assert not torch.allclose(got, getattr(untouched[tower], name), **CLOSE)


def test_an_interior_frame_can_be_masked_or_unimportant():
    """The same through the public road: masks with a hole."""
    streams = make_streams()
    mask = mask_of(["11101111"] * 3)
    masked = short_term_interaction(streams, plan(streams, {"vision": mask}), num_heads=HEADS)
    log_importance = torch.zeros(3, 8, dtype=torch.float64).masked_fill(~mask, -math.inf)
    faded = short_term_interaction(streams, plan(streams), num_heads=HEADS, log_importance=log_importance)
    torch.testing.assert_close(faded["text"].untimed, masked["text"].untimed, **CLOSE)
    torch.testing.assert_close(faded["audio"].timed, masked["audio"].timed, **CLOSE)
    torch.testing.assert_close(faded["vision"].timed, masked["vision"].timed, **CLOSE)


def changed_steps(before, after):
    return {t for t in range(before.shape[1]) if not torch.equal(before[:, t], after[:, t])}


def test_short_term_sees_its_window_only():
    """A change of one step of sound reaches the frames of its window, and no other."""
    streams = make_streams()
    windows = plan(streams)
    changed = streams["audio"].timed.clone()
    changed[:, 5] += 1
    after = streams | {"audio": Stream(changed, streams["audio"].untimed)}
    told = [short_term_interaction(s, windows, num_heads=HEADS) for s in (streams, after)]
    # Step 5 of 11 is at 0.5 of the clip: frame 4 of 8, in the window of frames 3 to 5.
    assert changed_steps(told[0]["vision"].timed, told[1]["vision"].timed) == {3, 4, 5}


@pytest.mark.parametrize("source", ["vision", "audio", "text"])
def test_long_term_sees_everything(source):
    """The importance of every frame depends on every frame, on sound and on text."""
    streams = make_streams()
    windows, frame_filter = plan(streams), make_filter()
    before = frame_filter(streams, windows)
    stream = streams[source]
    if stream.timed is not None:
        timed = stream.timed.clone()
        timed[:, 1] += torch.randn(3 * R, generator=torch.Generator().manual_seed(1))
        stream = Stream(timed, stream.untimed, stream.untimed_mask)
    else:
        stream = Stream(None, stream.untimed.roll(1, dims=-1))
    after = frame_filter(streams | {source: stream}, windows)
    assert changed_steps(before, after) == set(range(8))


def test_filter_starts_at_importance_nine_tenths():
    """At the start no frame is suppressed."""
    torch.manual_seed(0)
    streams = make_streams()
    importance = FrameFilter(R, HEADS).double()(streams, plan(streams)).exp()
    assert ((importance > 0.8) & (importance < 0.97)).all()


@pytest.mark.parametrize("missing", ["vision", "audio", "text"])
def test_missing_for_all_is_masked_for_some(missing):
    """A clip in whose batch others have a modality is told what it is told without it."""
    lengths = {"vision": 8, "audio": 11, "text": 5}
    nothing = torch.zeros(3, lengths[missing], dtype=torch.bool)
    present = torch.ones_like(nothing)
    mask = torch.where(torch.tensor([True, False, True])[:, None], nothing, present)
    streams = make_streams(text_mask=mask if missing == "text" else None)
    if missing == "audio":  # its untimed token goes with the sound
        audio = streams["audio"]
        streams["audio"] = Stream(audio.timed, audio.untimed, mask.any(1, keepdim=True))
    masks = {} if missing == "text" else {missing: mask}
    frame_filter = make_filter()
    some, g = interact(streams, plan(streams, masks), num_heads=HEADS, frame_filter=frame_filter)
    without = {tower: stream for tower, stream in streams.items() if tower != missing}
    none, g_none = interact(without, plan(without), num_heads=HEADS, frame_filter=frame_filter)
    full, _ = interact(make_streams(), plan(make_streams()), num_heads=HEADS, frame_filter=frame_filter)
    for tower in without:
        for name in ("timed", "untimed"):
            got, wanted, other = (getattr(m[tower], name) for m in (some, none, full))
            if got is not None:
                torch.testing.assert_close(got[[0, 2]], wanted[[0, 2]], **CLOSE)
                torch.testing.assert_close(got[1], other[1], **CLOSE)
                assert not torch.allclose(got[0], other[0], **CLOSE)
    if missing != "vision":
        torch.testing.assert_close(g[[0, 2]], g_none[[0, 2]], **CLOSE)
    else:
        assert g[0].eq(0).all()


def test_nothing_at_all_to_attend_to():
    """Clips of one modality, and of none, in a batch: finite, also the gradients, and told nothing."""
    text_mask = mask_of(["00000", "00000", "11111"])
    streams = make_streams(text_mask=text_mask)
    audio = streams["audio"]
    untimed = audio.untimed.requires_grad_()
    streams["audio"] = Stream(audio.timed.requires_grad_(), untimed, torch.zeros(3, 1, dtype=torch.bool))
    streams["vision"].timed.requires_grad_()
    masks = {"vision": mask_of(["11111111", "00000000", "00000000"]), "audio": torch.zeros(3, 11, dtype=torch.bool)}
    frame_filter = make_filter()
    messages, g = interact(streams, plan(streams, masks), num_heads=HEADS, frame_filter=frame_filter)
    told = [x for each in messages.values() for x in (each.timed, each.untimed) if x is not None]
    assert all(x.isfinite().all() for x in (*told, g))
    assert messages["vision"].timed.eq(0).all()
    sum(x.square().sum() for x in told).backward()
    assert all(x.grad.isfinite().all() for x in (untimed, audio.timed, streams["vision"].timed))
    assert all(p.grad.isfinite().all() for p in frame_filter.parameters())


def test_sound_windows_depend_on_the_valid_length_alone():
    """Without pictures a clip's windows are the same however much padding its batch gives it."""
    streams = make_streams(("audio", "text"))
    short = {
        "audio": Stream(streams["audio"].timed[:, :7], streams["audio"].untimed),
        "text": streams["text"],
    }
    padded = plan(streams, {"audio": mask_of(["11111110000"] * 3)})
    torch.testing.assert_close(
        short_term_interaction(streams, padded, num_heads=HEADS)["text"].untimed,
        short_term_interaction(short, plan(short), num_heads=HEADS)["text"].untimed,
        **CLOSE,
    )


def test_time_code_tells_frames_of_a_window_apart():
    """Frames that look alike hear, with the heads that look by time, what sounds while they are seen."""
    same = torch.zeros(1, 4, 1, 3 * R, dtype=torch.float64)
    sound = torch.zeros(1, 8, 1, 3 * R, dtype=torch.float64)
    sound[0, :, 0, 2 * R] = torch.arange(8)  # a value of the first head
    sound[0, :, 0, 3 * R - 1] = torch.arange(8)  # and one of the last
    streams = {"vision": Stream(same, None), "audio": Stream(sound, None)}
    told = short_term_interaction(streams, plan(streams, batch=1, window=4), num_heads=HEADS)["vision"].timed[0, :, 0]
    # Two steps of sound to a frame: 0 and 1, 2 and 3, ...
    torch.testing.assert_close(told[:, 0], torch.tensor([0.5, 2.5, 4.5, 6.5], dtype=torch.float64), rtol=0, atol=0.3)
    torch.testing.assert_close(told[:, -1], told[:1, -1].expand(4), **CLOSE)


def test_text_is_seen_beside_simultaneous_sound():
    """Half of the heads give every token alike the same weight, in or out of time."""
    streams = make_streams()
    streams = {
        tower: Stream(*(None if x is None else torch.cat([0 * x[..., : 2 * R], x[..., 2 * R :]], -1) for x in parts))
        for tower, s in streams.items()
        for parts in [(s.timed, s.untimed)]
    }
    windows = plan(streams, window=8)
    told = short_term_interaction(streams, windows, num_heads=HEADS)["vision"].timed
    values = [streams["audio"].timed[0, ..., 2 * R :].reshape(-1, R), streams["audio"].untimed[0, :, 2 * R :]]
    values += [streams["text"].untimed[0, :, 2 * R :], torch.zeros(1, R, dtype=torch.float64)]
    size = R // HEADS
    torch.testing.assert_close(told[0, 3, 1, size:], torch.cat(values).mean(0)[size:], **CLOSE)


def test_gradients_in_float64():
    """Through both modules, padding included, against central differences."""
    masks = {"vision": mask_of(["111", "110"]), "audio": mask_of(["1111", "1100"])}
    generator = torch.Generator().manual_seed(0)
    vision = torch.randn(2, 3, 2, 3 * 4, generator=generator, dtype=torch.float64, requires_grad=True)
    audio = torch.randn(2, 4, 1, 3 * 4, generator=generator, dtype=torch.float64, requires_grad=True)
    text = torch.randn(2, 2, 3 * 4, generator=generator, dtype=torch.float64, requires_grad=True)
    windows = plan_windows({"vision": 3, "audio": 4}, masks, batch=2, window=2, num_audio_windows=2, device=CPU)
    torch.manual_seed(0)
    frame_filter = FrameFilter(4, 1).double()

    def run(vision, audio, text):
        streams = {"vision": Stream(vision, None), "audio": Stream(audio, None), "text": Stream(None, text)}
        messages, g = interact(streams, windows, num_heads=1, frame_filter=frame_filter)
        return messages["vision"].timed, messages["audio"].timed, messages["text"].untimed, g

    assert torch.autograd.gradcheck(run, (vision, audio, text))


def test_autocast_does_not_reach_inside():
    """Bottlenecks are computed in float32 whatever surrounds them."""
    streams = {
        tower: Stream(*(None if x is None else x.float() for x in (s.timed, s.untimed)))
        for tower, s in make_streams().items()
    }
    frame_filter = make_filter().float()
    arguments = {"num_heads": HEADS, "frame_filter": frame_filter}
    plain, _ = interact(streams, plan(streams), **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = interact(streams, plan(streams), **arguments)
    for tower in streams:
        assert cast[tower].untimed is None or torch.equal(cast[tower].untimed, plain[tower].untimed)
        assert cast[tower].timed is None or torch.equal(cast[tower].timed, plain[tower].timed)


@pytest.mark.parametrize("frames", [1, 2, 5, 16])
def test_the_number_of_windows_grows_with_the_frames(frames):
    """Cost is linear: windows as many as needed, places as few as needed."""
    windows = plan_windows(
        {"vision": frames, "audio": 3 * frames}, {}, batch=2, window=4, num_audio_windows=8, device=CPU
    )
    assert windows.count == math.ceil(frames / 4)
    assert windows.steps["vision"].take.shape == (2, windows.count, min(frames, 4))
    assert windows.steps["audio"].take.shape == (2, windows.count, 3 * min(frames, 4))
