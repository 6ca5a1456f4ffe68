"""A clip's picture: everything lies at its second, on one axis."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from media_files import tone, write

from peft_read import plot_importance


LEVELS = [torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([1.0, 0.75, 0.5, 0.0])]
ANSWERS = {"truth": ["a", None, None, "b"], "model": ["a", None, "c", None], "clip": "all of it"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Four seconds, whose sound begins after two."""
    path = tmp_path_factory.mktemp("clip") / "late.mkv"
    return write(path, sound=tone(2.0, [(0, 2)]), sound_start=2.0)


def test_frames_sound_importance_and_answers_share_their_seconds(clip, tmp_path):
    figure = plot_importance(LEVELS, clip, answers=ANSWERS, title="what?", path=tmp_path / "clip.png")
    assert (tmp_path / "clip.png").stat().st_size > 1000
    frames, sound, levels, answers = figure.axes[:4]
    assert frames.get_title() == "what?"
    extents = [image.get_extent()[:2] for image in frames.images]
    np.testing.assert_allclose(extents, [(0, 1), (1, 2), (2, 3), (3, 4)], atol=0.06)
    shades = [float(image.get_array().mean()) for image in frames.images]
    assert shades == sorted(shades)
    left, right = sound.images[0].get_extent()[:2]
    assert left == pytest.approx(2, abs=0.1)
    assert right == pytest.approx(4, abs=0.2)
    mesh = levels.collections[0]
    np.testing.assert_allclose(mesh.get_array(), torch.stack(LEVELS))
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], range(5), atol=0.06)
    assert all(axis.get_xlim() == pytest.approx((0, 4), abs=0.06) for axis in (frames, sound, levels, answers))
    assert answers.get_xlabel() == "seconds"
    texts = {(round(text.get_position()[0], 1), text.get_text()): text.get_color() for text in answers.texts}
    assert texts == {
        (0.5, "a"): "tab:green",
        (3.5, "b"): "black",
        (2.5, "c"): "tab:red",
        (3.5, "-"): "tab:red",
        (2.0, "all of it"): "black",
    }


def test_what_there_is_is_drawn(clip):
    """Without a video, without sound, without a filter, with steps of two frames, and into a part of a figure."""
    assert len(plot_importance(LEVELS).axes) == 2
    assert len(plot_importance(LEVELS, clip, audio=None).axes) == 3
    assert len(plot_importance(None, clip, frames=4, answers=ANSWERS).axes) == 3
    images = np.zeros((4, 8, 8, 3), np.uint8)
    assert plot_importance(LEVELS, images).axes[1].get_xlabel() == "frames"
    tubelets = plot_importance([level[:2] for level in LEVELS], clip, frames=4)
    edges = tubelets.axes[2].collections[0].get_coordinates()[0, :, 0]
    np.testing.assert_allclose(edges, [0, 2, 4], atol=0.06)
    whole = Figure()
    for part in whole.subfigures(2):
        assert plot_importance(LEVELS, clip, figure=part) is part
    assert len(whole.axes) == 8


@pytest.mark.parametrize(
    ("importance", "options", "message"),
    [
        ([torch.zeros(2, 4)], {}, r"importance of one clip's frames, \(frames,\), got \[\(2, 4\)\]"),
        ([torch.zeros(4), torch.zeros(3)], {}, r"got \[\(3,\), \(4,\)\]"),
        ([], {}, "got none"),
        (LEVELS, {"answers": {"model": ["a"]}}, "1 answers of 'model' for 4 frames"),
        (LEVELS, {"figure": Figure().subfigures(1), "path": "a.png"}, "Only a whole figure can be written"),
    ],
)
def test_what_does_not_fit_is_refused(importance, options, message):
    with pytest.raises(ValueError, match=message):
        plot_importance(importance, **options)
