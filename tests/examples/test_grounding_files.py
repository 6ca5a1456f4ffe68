"""The benchmarks' files: what is read, and that what is wrong is named with its file and line."""

import json

import numpy as np
import pytest
from benchmark_files import write_charades, write_how2, write_qvhighlights, write_tvsum, write_youtube
from grounding.charades_sta import SOURCES, charades_recall, read_charades_sta, suppress_softly
from grounding.domains import read_split, trapezoid_precision
from grounding.qvhighlights import prediction, read_qvhighlights
from grounding.tvsum import read_tvsum, tvsum_top5_map
from grounding.youtube_highlights import read_youtube_highlights, youtube_highlights_map
from summarisation.how2 import read_how2


def unit(rows, epsilon):
    return np.stack([row / (np.sqrt((row.astype(np.float64) ** 2).sum()) + epsilon) for row in rows])


def test_qvhighlights_as_moment_detr_prepares_it(tmp_path):
    """Each source of length 1 by itself, cut to the shortest and to 75 clips, with endpoints; the text likewise."""
    folder = write_qvhighlights(tmp_path, rows=(77, 76), duration=150, tokens=40)
    sample = read_qvhighlights(folder, "train")[0]
    slowfast, clip = (
        np.load(folder / f"{name}_features/abc_-d_60.0_210.0.npz")["features"] for name in ("slowfast", "clip")
    )
    assert sample.video.shape == (75, 2818)
    assert np.asarray(sample.video).dtype == np.float32
    expected = np.concatenate([unit(slowfast[:75], 1e-5), unit(clip[:75], 1e-5)], axis=1)
    assert np.allclose(np.asarray(sample.video)[:, :2816], expected, atol=1e-6)
    assert np.allclose(np.asarray(sample.video)[[0, 74], 2816:], [[0, 1 / 75], [74 / 75, 1]])
    text = np.load(folder / "clip_text_features/qid7.npz")["last_hidden_state"]
    assert np.allclose(sample.text, unit(text[:32].astype(np.float32), 1e-5), atol=1e-6)
    assert sample.spans.tolist() == pytest.approx(np.array([[13 / 150, 6 / 150], [42 / 150, 4 / 150]]))
    assert sample.saliency.shape == (75,)
    assert sample.saliency[[5, 6, 7, 20, 21, 0]].tolist() == pytest.approx([9 / 12, 11 / 12, 5 / 12, 5 / 12, 0.5, 0])


def test_qvhighlights_of_odd_length_and_without_truth(tmp_path):
    """The length is the duration's, not the name's; a test line has no truth."""
    folder = write_qvhighlights(tmp_path, rows=(64, 63), duration=127)
    sample = read_qvhighlights(folder, "train")[0]
    assert (len(sample.video), len(sample.saliency), sample.seconds) == (63, 63, 127)
    assert sample.spans[0].tolist() == pytest.approx([13 / 126, 6 / 126])
    test = read_qvhighlights(folder, "test")[0]
    assert test.spans is None
    assert test.saliency is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qid": "7"}, r"train_release\.jsonl:1: field 'qid' is missing or no integer"),
        ({"query": ""}, r"jsonl:1: field 'query' is missing or no text"),
        ({"vid": None}, r"jsonl:1: field 'vid' is missing or no text"),
        ({"duration": 0}, r"jsonl:1: `duration` must be positive"),
        (
            {"duration": 120},
            r"jsonl:1: the rows of one video differ by more than 2: .*slowfast_features.* 75.*labels 60",
        ),
        ({"relevant_windows": [[5, 2]]}, r"jsonl:1: `relevant_windows` must be pairs of seconds"),
        (
            {"relevant_clip_ids": [5, 6, 7, 20, 75]},
            r"jsonl:1: `relevant_clip_ids` must be numbers of clips from 0 to 74",
        ),
        ({"saliency_scores": [[1, 2, 3]]}, r"jsonl:1: `saliency_scores` must have a row for each of 5"),
        ({"saliency_scores": [[1, 2, 5]] * 5}, r"jsonl:1: a row of `saliency_scores` must be 3 scores from 0 to 4"),
        ({"vid": "gone_0.0_150.0"}, r"jsonl:1: the features .*slowfast_features/gone_0\.0_150\.0\.npz aren't there"),
    ],
)
def test_a_bad_line_of_qvhighlights_is_named(tmp_path, change, message):
    """Which line, and what is wrong with it."""
    folder = write_qvhighlights(tmp_path, change=change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_qvhighlights(folder, "train")


def spoil(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"abc_-d_60\.0_210\.0\.npz can't be read as npz"),
        (b"PK\x03\x04 cut off", r"can't be read as npz"),
        ({"feature": np.zeros((75, 512))}, r"npz has no array 'features', but 'feature'"),
        ({"features": np.zeros((75, 768))}, r"npz holds \(75, 768\), expected \(rows, 512\)"),
        ({"features": np.zeros((75, 1, 512))}, r"npz holds \(75, 1, 512\), expected \(rows, 512\)"),
        ({"features": np.zeros((0, 512))}, r"npz holds \(0, 512\)"),
        ({"features": np.full((75, 512), np.nan)}, r"npz holds numbers that aren't finite"),
        ({"features": np.zeros((71, 512))}, r"the rows of one video differ by more than 2: .*clip_features.* 71"),
    ],
)
def test_a_bad_feature_file_is_named(tmp_path, content, message):
    """The file, and the line of the annotations that wants it."""
    folder = write_qvhighlights(tmp_path)
    spoil(folder / "clip_features" / "abc_-d_60.0_210.0.npz", content)
    with pytest.raises(ValueError, match=rf"train_release\.jsonl:1: .*{message}"):
        np.asarray(read_qvhighlights(folder, "train")[0].video)


def test_features_stay_on_disk(tmp_path):
    """A whole set doesn't fit into memory: rows are read when they are used, and lengths are known before."""
    sample = read_qvhighlights(write_qvhighlights(tmp_path), "train")[0]
    before = np.asarray(sample.video)
    (tmp_path / "clip_features" / "abc_-d_60.0_210.0.npz").unlink()
    assert sample.video.shape == before.shape
    with pytest.raises(FileNotFoundError, match=r"train_release\.jsonl:1: the features .* aren't there"):
        np.asarray(sample.video)


def test_a_file_that_is_no_annotations(tmp_path):
    """Not there, empty, not JSON, not an object, a query twice."""
    path = tmp_path / "highlight_train_release.jsonl"
    with pytest.raises(FileNotFoundError, match=r"highlight_train_release\.jsonl aren't there"):
        read_qvhighlights(tmp_path, "train")
    for text, message in (
        ("\n", "has no lines"),
        ("{", "jsonl:1: not valid JSON"),
        ("[]", "jsonl:1: expected an object"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_qvhighlights(tmp_path, "train")
    folder = write_qvhighlights(tmp_path)
    path.write_text(path.read_text(encoding="utf-8") * 2, encoding="utf-8")
    with pytest.raises(ValueError, match=r"jsonl:5: qid 7 is in .*jsonl:1 already"):
        read_qvhighlights(folder, "train")


def test_a_submission_is_rounded_and_cut_as_moment_detr_does(tmp_path):
    """Best first, in [0, 150], on the grid of two seconds."""
    sample = read_qvhighlights(write_qvhighlights(tmp_path), "train")[0]
    windows = np.array([[3.1, 9.2, 0.2], [-4, 151, 0.7]])
    line = prediction(sample, windows, np.array([0.25, 0.5]))
    assert line["pred_relevant_windows"] == [[0, 150, 0.7], [4, 10, 0.2]]
    assert line["pred_saliency_scores"] == [0.25, 0.5]
    assert (line["qid"], line["vid"]) == (7, "abc_-d_60.0_210.0")


def test_youtube_highlights_as_umt_prepares_it(tmp_path):
    """Both halves of the pictures and the sound as they are, cut to the shortest; borderline clips are negative."""
    folder = write_youtube(tmp_path, match=[-1, 0, 1, 1], rows=(5, 4, 3))
    sample = read_youtube_highlights(folder, "dog", "train")[0]
    halves = [np.load(folder / f"video_features/dog0_{half}.npy")[:3] for half in ("rgb", "opt")]
    expected = np.concatenate([*halves, np.load(folder / "audio_features/dog0.npy")], axis=1)
    assert np.allclose(np.asarray(sample.video), expected)
    assert sample.saliency.tolist() == sample.truth["labels"] == [0, 0, 1]
    assert sample.seconds == 12
    assert sample.text is None


def test_tvsum_as_umt_prepares_it(tmp_path):
    """The target is the mean importance, from 0 to 1; the title's features are under their own key."""
    folder = write_tvsum(tmp_path, clips=4)
    sample = read_tvsum(folder, "VT", "val")[0]
    anno = json.loads((folder / "tvsum_anno.json").read_text(encoding="utf-8"))[sample.name]["anno"]
    assert sample.saliency.tolist() == pytest.approx([(sum(row) - 20) / 80 for row in anno])
    assert sample.text.shape[1] == 512
    assert sample.seconds == 8


def test_domains_and_videos_that_are_not_there(tmp_path):
    """Unknown domains and splits are named; a video without annotations is left out, and said so."""
    folder = write_youtube(tmp_path)
    with pytest.raises(ValueError, match=r"youtube_splits\.json has no domain 'cat', but 'dog', 'surfing'"):
        read_youtube_highlights(folder, "cat", "train")
    with pytest.raises(ValueError, match="domain 'dog' has no list 'test' of video ids"):
        read_youtube_highlights(folder, "dog", "test")
    with pytest.raises(ValueError, match="no video of 'dog', 'train' has annotations"):
        read_split(folder / "youtube_splits.json", "dog", "train", set())
    with pytest.warns(UserWarning, match="1 of 2 videos of 'dog', 'train' have no annotations and are left out: dog1"):
        assert read_split(folder / "youtube_splits.json", "dog", "train", {"dog0"}) == ["dog0"]
    (folder / "youtube_splits.json").unlink()
    with pytest.raises(FileNotFoundError, match="the splits of each domain, which UMT has"):
        read_youtube_highlights(folder, "dog", "train")


@pytest.mark.parametrize(
    ("read", "file", "change", "message"),
    [
        (
            read_youtube_highlights,
            "youtube_anno.json",
            {"match": [1, 2]},
            r"youtube_anno\.json, video 'dog0': `match` must",
        ),
        (read_youtube_highlights, "youtube_anno.json", {"match": []}, "`match` must be one of -1, 0, 1"),
        (read_youtube_highlights, "youtube_anno.json", {"fps": 0}, "`frames` and `fps` must be positive"),
        (read_youtube_highlights, "youtube_anno.json", {"match": [1] * 9}, "differ by more than 2: .*dog0_rgb.npy 4"),
        (read_tvsum, "tvsum_anno.json", {"anno": []}, r"tvsum_anno\.json, video 'dog0': `anno` must have a row"),
        (read_tvsum, "tvsum_anno.json", {"anno": [[1] * 19]}, "clip 0 of `anno` must be 20 numbers from 1 to 5"),
        (read_tvsum, "tvsum_anno.json", {"anno": [[1] * 20, [0] * 20]}, "clip 1 of `anno` must be 20 numbers"),
    ],
)
def test_a_bad_record_is_named(tmp_path, read, file, change, message):
    """Which file and which video, and what is wrong with it."""
    folder = write_youtube(tmp_path) if read is read_youtube_highlights else write_tvsum(tmp_path, domain="dog")
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    content["dog0"] |= change
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read(folder, "dog", "train")


def test_charades_as_umt_prepares_it(tmp_path):
    """Swapped boundaries, no full stop, lower case, words without a vector, rows of length 1."""
    folder = write_charades(tmp_path, ["AAAAA 3.0 1.5##A person opens a Door.", "AAAAA 0.0 1.0##a zebra"])
    first, second = read_charades_sta(folder, "train")
    rgb, audio = (np.load(folder / f"{kind}_features/AAAAA.npy") for kind in ("rgb", "audio"))
    expected = np.concatenate([unit(rgb[:24], 1e-12), unit(audio[:24], 1e-12)], axis=1)
    assert np.allclose(np.asarray(first.video), expected, atol=1e-6)
    assert first.seconds == pytest.approx(4)
    assert first.truth["window"] == [1.5, 3.0]
    assert first.spans[0].tolist() == pytest.approx([2.25 / 4, 1.5 / 4])
    assert first.text.shape == (5, 300)
    assert (first.text[0] == first.text[3]).all()
    assert first.text[4].any()
    assert not second.text[1].any()
    assert read_charades_sta(folder, "train", SOURCES["vo"])[0].video.shape == (25, 8192)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("AAAAA 1.0##a person", r"charades_sta_train\.txt:2: expected `video start end##sentence`"),
        ("AAAAA 1.0 2.0 a person", "txt:2: expected `video start end##sentence`"),
        ("AAAAA 1.0 x##a person", "txt:2: expected `video start end##sentence`"),
        ("AAAAA 1.0 2.0##.", "txt:2: expected `video start end##sentence`"),
        ("AAAAA -1.0 2.0##a person", "txt:2: start and end must be seconds from 0 on"),
        ("BBBBB 1.0 2.0##a person", r"txt:2: the features .*rgb_features/BBBBB\.npy aren't there"),
    ],
)
def test_a_bad_line_of_charades_is_named(tmp_path, line, message):
    """Which line, and what is wrong with it."""
    folder = write_charades(tmp_path, ["AAAAA 0.0 1.0##a person", line])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_charades_sta(folder, "train")


def test_bad_word_vectors_are_named(tmp_path):
    """A line of another length, one that isn't numbers, no file."""
    folder = write_charades(tmp_path, ["AAAAA 0.0 1.0##a person"])
    path = folder / "glove.6B.300d.txt"
    for text, message in (("a 1 2", "txt:1: 2 numbers, expected 300"), ("a x", "txt:1: not a word and numbers")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_charades_sta(folder, "train")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"word vectors .* aren't there"):
        read_charades_sta(folder, "train")


def test_how2_is_aligned_by_line(tmp_path):
    """Features as they are, at most 256 rows; texts without their ids."""
    folder = write_how2(tmp_path, rows=300)
    samples = read_how2(folder, "train")
    assert samples[0].video.shape == (256, 2048)
    assert samples[0].transcript == "welcome back today we will tune a guitar ."
    assert samples[0].summary == "how to tune a guitar ."


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("desc.tok.txt", "a1 x\n", r"desc\.tok\.txt has 1 lines and tran\.tok\.txt beside it 2"),
        ("desc.tok.txt", "a1 x\nb9 y\n", r"desc\.tok\.txt:2 is of video 'b9', but line 2 of tran\.tok\.txt of 'a2'"),
        ("desc.tok.txt", "a1 x\na2\n", r"desc\.tok\.txt:2: video 'a2' has no summary"),
        ("desc.tok.txt", "a1 x\n\n", r"desc\.tok\.txt:2 is empty"),
        ("desc.tok.txt", None, r"desc\.tok\.txt isn't there"),
    ],
)
def test_a_bad_line_of_how2_is_named(tmp_path, file, text, message):
    """Which file and line, and what is wrong with it."""
    folder = write_how2(tmp_path)
    path = folder / "sum_train" / file
    path.unlink() if text is None else path.write_text(text, encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_how2(folder, "train")
    with pytest.raises(ValueError, match="`split` must be one of"):
        read_how2(folder, "devtest")


def test_precision_by_trapezoids_by_hand():
    """Ranked 1, 0, 1: half of 1, then half of the mean of 1/2 and 2/3; the first two alone are all there is."""
    scores, positive = np.array([0.9, 0.8, 0.7]), np.array([True, False, True])
    assert trapezoid_precision(scores, positive) == pytest.approx(0.5 + 0.5 * (1 / 2 + 2 / 3) / 2)
    assert trapezoid_precision(scores, positive, 2) == 1
    assert trapezoid_precision(-scores, ~positive) == pytest.approx((0 + 1 / 2) / 2)
    assert trapezoid_precision(scores, positive & False) == 0


def test_youtube_map_by_hand():
    """A mean over videos, in which one without highlights counts 0."""
    scores, labels = {"a": [3, 2, 1], "b": [1, 2]}, {"a": [1, 0, 1], "b": [0, 0]}
    assert youtube_highlights_map(scores, labels)["mAP"] == pytest.approx(100 * (0.5 + 0.5 * 7 / 12) / 2)
    with pytest.raises(ValueError, match="must be of the same videos"):
        youtube_highlights_map({"a": [1]}, labels)
    with pytest.raises(ValueError, match="Video 'b' has 1 scores and 2 labels"):
        youtube_highlights_map(scores | {"b": [1]}, labels)


def test_tvsum_map_by_hand():
    """Positive above the lower median, among the five best; annotators and videos count alike."""
    importance = {"a": [[1, 5], [2, 5], [3, 5], [4, 5], [5, 5], [5, 5]]}
    # First annotator: median 3, so clips 3, 4, 5 are positive; ranked 5, 4, 3, 2, 1. The second finds all alike.
    assert tvsum_top5_map({"a": [0, 1, 2, 3, 4, 5]}, importance)["mAP@5"] == pytest.approx(50)
    # Ranked 0, 1, 2, 3, 4: positives at ranks 4 and 5; precision 0 before, then 1/4 and 2/5.
    expected = 0.5 * (0 + 1 / 4) / 2 + 0.5 * (1 / 4 + 2 / 5) / 2
    assert tvsum_top5_map({"a": [9, 8, 7, 6, 5, 0]}, importance)["mAP@5"] == pytest.approx(50 * expected)
    with pytest.raises(ValueError, match="Video 'a' has 1 scores and 6 clips"):
        tvsum_top5_map({"a": [1]}, importance)


def test_charades_recall_by_hand():
    """What overlaps a better window loses score; ranks after that."""
    windows = np.array([[0, 10, 0.9], [0, 9, 0.8], [20, 30, 0.5]])
    suppressed = suppress_softly(windows)
    assert suppressed[:, :2].tolist() == [[0, 10], [20, 30], [0, 9]]
    assert suppressed[2, 2] == pytest.approx(0.8 * np.exp(-(0.9**2) / 0.5))
    result = charades_recall({0: windows, 1: windows, 2: np.zeros((0, 3))}, {0: [0, 12], 1: [20, 27], 2: [0, 1]})
    assert result["Rank1@0.5"] == result["Rank1@0.7"] == pytest.approx(100 / 3)
    assert result["Rank5@0.5"] == result["Rank5@0.7"] == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match="must be of the same sentences"):
        charades_recall({}, {0: [0, 1]})
