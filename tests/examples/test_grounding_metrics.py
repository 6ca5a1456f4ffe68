"""QVHighlights' metrics: cases computed by hand, and random ones against slow implementations in exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
from grounding.metrics import highlight_metrics, moment_retrieval_metrics
from sklearn.metrics import precision_recall_curve


MOMENT_KEYS = {f"MR-{length}-mAP" for length in ("short", "middle", "long", "full")}
MOMENT_KEYS |= {"MR-full-mAP@0.5", "MR-full-mAP@0.75", "MR-full-R1@0.5", "MR-full-R1@0.7"}
HIGHLIGHT_KEYS = {f"HL-min-{least}-{kind}" for least in ("Fair", "Good", "VeryGood") for kind in ("mAP", "Hit1")}


def moments(windows, predicted, qid=1):
    return {"qid": qid, "pred_relevant_windows": predicted}, {"qid": qid, "relevant_windows": windows}


def retrieval(*pairs):
    return moment_retrieval_metrics([prediction for prediction, _ in pairs], [truth for _, truth in pairs])


def highlights(scores, clips, ratings, duration=None, qid=1):
    duration = 2 * len(scores) if duration is None else duration
    truth = {"qid": qid, "duration": duration, "relevant_clip_ids": clips, "saliency_scores": ratings}
    return highlight_metrics([{"qid": qid, "pred_saliency_scores": scores}], [truth])


def test_a_query_by_hand():
    """Two moments, three windows: hit, taken already, hit up to IoU .9; the first one's IoU is .8."""
    result = retrieval(moments([[0, 20], [40, 50]], [[2, 18, 0.9], [0, 20, 0.8], [41, 50, 0.7]]))
    assert set(result) == MOMENT_KEYS
    assert result["MR-full-mAP@0.5"] == result["MR-full-mAP@0.75"] == 83.33
    assert result["MR-full-mAP"] == 74.17
    assert (result["MR-full-R1@0.5"], result["MR-full-R1@0.7"]) == (100, 100)
    # Of the range (10, 30] only the first moment is left: hit up to .8, then second place up to .95.
    assert result["MR-middle-mAP"] == pytest.approx((7 * 100 + 3 * 50) / 10)
    assert result["MR-short-mAP"] == pytest.approx((9 * 100 / 3) / 10)
    assert math.isnan(result["MR-long-mAP"])


@pytest.mark.parametrize(
    ("windows", "predicted", "at_half"),
    [
        ([[0, 10]], [[50, 60, 0.1]] * 10 + [[0, 10, 0.9]], 0.0),  # the eleventh isn't looked at
        ([[0, 10]], [[50, 60, 0.1]] * 9 + [[0, 10, 0.9]], 100.0),  # the tenth is, and its score makes it the first
        ([[0, 10]], [[50, 60, 0.5], [0, 10, 0.5]], 50.0),  # equal scores: as they stand
        ([[0, 10]], [[0, 10, 0.5], [50, 60, 0.5]], 100.0),
        ([[0, 10]], [[0, 10, -3.0], [50, 60, -9.0]], 100.0),
        ([[0, 10]], [[0, 20, 0.5]], 100.0),  # IoU exactly at the threshold
        ([[0, 10]], [[0, 20.1, 0.5]], 0.0),
        ([[0, 10]], [[4, 4, 0.5]], 0.0),  # no length
        ([[0, 10]], [[9, 3, 0.5]], 0.0),  # the wrong way round
        ([[0, 10]], [], 0.0),
        ([[0, 10]], [[-5, 5, 0.5], [0, 10, 0.4]], 50.0),  # beyond the video
        (
            [[0, 2], [2, 4]],
            [[0, 4, 0.9], [0, 2, 0.8]],
            100.0,
        ),  # of equal IoU the last is taken, which leaves the first
        ([[0, 2], [2, 4]], [[0, 4, 0.9], [2, 4, 0.8]], 50.0),
        (
            [[0, 10], [20, 30]],
            [[50, 60, 0.9], [0, 10, 0.8], [20, 30, 0.7]],
            100 * 2 / 3,
        ),  # the envelope of 1/2 and 2/3
    ],
)
def test_odd_queries_by_hand(windows, predicted, at_half):
    """What of the order, the scores and the windows counts."""
    assert retrieval(moments(windows, predicted))["MR-full-mAP@0.5"] == round(at_half, 2)


def test_exact_overlaps_count_at_every_threshold():
    """On a grid, IoUs meet thresholds exactly; sums of 0.05 would lose some."""
    for twentieths in range(10, 20):
        result = retrieval(moments([[0, 40]], [[0, 2 * twentieths, 1.0]]))
        assert result["MR-full-mAP"] == pytest.approx(10 * (twentieths - 9))
        assert result["MR-full-R1@0.7"] == (100 if twentieths >= 14 else 0)


def test_the_first_window_is_the_first_in_its_order():
    """R1 doesn't look at scores; the mean is over queries, each with all its moments."""
    first = moments([[0, 10], [40, 60]], [[40, 60, 0.1], [0, 10, 0.9]], qid=1)
    second = moments([[0, 10]], [[20, 30, 0.1], [0, 10, 0.9]], qid=2)
    third = moments([[0, 10]], [], qid=3)
    result = retrieval(first, second, third)
    assert result["MR-full-R1@0.5"] == 33.33
    assert result["MR-full-mAP@0.5"] == 66.67


def test_lengths_leave_out_moments_but_not_windows():
    """(0, 10], (10, 30], (30, 150]; a query counts in each range in which it has a moment."""
    ends = {"short": (10, 8), "middle": (30, 12), "long": (150, 32)}
    for name, lengths in ends.items():
        for length in lengths:
            result = retrieval(moments([[0, length]], [[0, length, 1.0]]))
            assert result[f"MR-{name}-mAP"] == 100
            assert all(math.isnan(result[f"MR-{other}-mAP"]) for other in ends if other != name)
    result = retrieval(moments([[0, 160]], [[0, 160, 1.0]]))
    assert result["MR-full-mAP"] == 100
    assert math.isnan(result["MR-long-mAP"])
    both = retrieval(moments([[0, 10], [20, 50]], [[0, 10, 0.9], [20, 50, 0.8]]))
    assert (both["MR-short-mAP"], both["MR-middle-mAP"]) == (100, 50)  # the other's window is a false one


def test_a_video_by_hand():
    """Four clips, two of which were rated; three persons' precisions are averaged, one without any is 0."""
    result = highlights([0.9, 0.1, 0.8, 0.2], [1, 2], [[4, 2, 0], [4, 3, 1]])
    assert set(result) == HIGHLIGHT_KEYS
    # At least 2: clips 1 and 2 for the first two, ranked second and last: (1/2 + 1/2) / 2; nothing for the third.
    assert result["HL-min-Fair-mAP"] == round(100 * (0.5 + 0.5 + 0) / 3, 2)
    assert result["HL-min-Good-mAP"] == round(100 * (0.5 + 0.5 + 0) / 3, 2)
    assert result["HL-min-VeryGood-mAP"] == round(100 * 0.5 / 3, 2)
    assert result["HL-min-Fair-Hit1"] == 0
    assert highlights([0.1, 0.9, 0.9, 0.2], [1, 2], [[4, 2, 0], [4, 3, 1]])["HL-min-VeryGood-Hit1"] == 100


@pytest.mark.parametrize(
    ("scores", "duration", "clips", "precision", "hit"),
    [
        ([3, 2, 1], 6, [0], 100, 100),
        ([1, 1, 1], 6, [1], 100 / 3, 0),  # equal scores are one step; the first of them is the best
        ([1, 1, 1], 6, [0], 100 / 3, 100),
        ([2, 2, 1], 6, [0, 1, 2], 100, 100),  # everything is a highlight
        ([2, 2, 1, 1], 8, [0, 1, 2], (1 + 0.75) / 2 * 100, 100),  # a step that gains two counts once
        ([3, 2, 1], 6, [], 0, 0),
        ([3, 2, 1, 9], 6, [0], 100, 0),  # a clip beyond is cut off, but is the best
        ([-1, -2], 6, [0], 50, 100),  # a missing clip has 0, more than -1
        ([-1, -2], 6, [2], 100, 0),
        ([3, 2], 7, [0], 100, 100),  # an odd duration has no half clips
        ([1], 5, [1], 100 / 2, 0),
    ],
)
def test_odd_videos_by_hand(scores, duration, clips, precision, hit):
    """Ties, lists that are too long or too short, nothing or everything a highlight."""
    result = highlights(scores, clips, [[4, 4, 4]] * len(clips), duration)
    assert result["HL-min-VeryGood-mAP"] == round(precision, 2)
    assert result["HL-min-VeryGood-Hit1"] == hit


def slow_overlap(one, other):
    common = min(one[1], other[1]) - max(one[0], other[0])
    return common / (one[1] - one[0] + other[1] - other[0] - common) if common > 0 else Fraction(0)


def slow_moment_map(predictions, truth, above, up_to, threshold):
    """By fractions, one window after the other; precisions at each hit are the best at that or a later hit."""
    values = []
    for prediction, wanted in zip(predictions, truth, strict=True):
        free = [w for w in wanted["relevant_windows"] if up_to is None or above < w[1] - w[0] <= up_to]
        if not free:
            continue
        many, hits, ranks = len(free), 0, []
        for rank, window in enumerate(sorted(prediction["pred_relevant_windows"][:10], key=lambda w: -w[2]), start=1):
            best = max(free, key=lambda w: slow_overlap(window, w), default=None)
            if best is not None and slow_overlap(window, best) >= threshold:
                free.remove(best)
                hits += 1
                ranks.append(Fraction(hits, rank))
        values.append(sum(max(ranks[i:]) for i in range(len(ranks))) / many)
    return float(100 * sum(values, Fraction(0)) / len(values)) if values else math.nan


@pytest.mark.parametrize("seed", range(8))
def test_random_moments_against_exact_arithmetic(seed):
    """On the grid of two seconds, with equal scores, more than ten windows, overlapping ones, and none."""
    rng = np.random.default_rng(seed)

    def window(longest=60):
        start = 2 * int(rng.integers(0, 60))
        return [Fraction(start), Fraction(start + 2 * int(rng.integers(1, longest // 2)))]

    predictions, truth = [], []
    for qid in range(20):
        true = []
        for candidate in (window() for _ in range(rng.integers(1, 9))):
            if all(slow_overlap(candidate, w) == 0 for w in true):
                true.append(candidate)
        near = [[w[0] + 2 * int(rng.integers(-1, 2)), w[1] + 2 * int(rng.integers(0, 3))] for w in true * 2]
        found = [[*w, int(rng.integers(0, 4))] for w in near + [window() for _ in range(rng.integers(0, 9))]]
        rng.shuffle(found)
        predictions.append({"qid": qid, "pred_relevant_windows": found if rng.random() > 0.1 else []})
        truth.append({"qid": qid, "relevant_windows": true})
    result = moment_retrieval_metrics(predictions, truth)
    thresholds = [Fraction(t, 100) for t in range(50, 100, 5)]
    for name, length in {"short": (0, 10), "middle": (10, 30), "long": (30, 150), "full": (0, None)}.items():
        by_threshold = [slow_moment_map(predictions, truth, *length, t) for t in thresholds]
        assert result[f"MR-{name}-mAP"] == pytest.approx(np.mean(by_threshold), abs=0.006, nan_ok=True)
    for threshold in (0.5, 0.75):
        expected = slow_moment_map(predictions, truth, 0, None, Fraction(threshold))
        assert result[f"MR-full-mAP@{threshold}"] == pytest.approx(expected, abs=0.006)
    for threshold in (Fraction(1, 2), Fraction(7, 10)):
        hits = [
            bool(p["pred_relevant_windows"])
            and max(slow_overlap(p["pred_relevant_windows"][0], w) for w in t["relevant_windows"]) >= threshold
            for p, t in zip(predictions, truth, strict=True)
        ]
        assert result[f"MR-full-R1@{float(threshold)}"] == pytest.approx(100 * np.mean(hits), abs=0.006)


def slow_precision(highlight, scores):
    """From scikit-learn's curve, as the benchmark's script takes it: where recall changes, the running maximum."""
    if len(set(highlight)) == 1:
        return float(highlight[0])
    precision, recall, _ = precision_recall_curve(highlight, scores)
    return np.mean([max(precision[: i + 1]) for i in range(len(recall) - 1) if recall[i + 1] != recall[i]])


@pytest.mark.parametrize("seed", range(8))
def test_random_videos_against_scikit_learn(seed):
    """With equal and negative scores, lists of other lengths, odd durations, unrated videos and doubtful persons."""
    rng = np.random.default_rng(seed)
    predictions, truth = [], []
    for qid in range(20):
        duration = int(rng.integers(20, 60))
        clips = sorted(rng.choice(duration // 2, rng.integers(0, duration // 2 + 1), replace=False).tolist())
        ratings = rng.integers(0 if rng.random() > 0.3 else 4, 5, size=(len(clips), 3)).tolist()
        scores = rng.normal(size=duration // 2 + rng.integers(-2, 3)).round(int(rng.integers(0, 3))).tolist()
        predictions.append({"qid": qid, "pred_saliency_scores": scores})
        truth.append({"qid": qid, "duration": duration, "relevant_clip_ids": clips, "saliency_scores": ratings})
    result = highlight_metrics(predictions[::-1], truth)
    for name, least in {"Fair": 2, "Good": 3, "VeryGood": 4}.items():
        precisions, hits = [], []
        for prediction, wanted in zip(predictions, truth, strict=True):
            scores, table = prediction["pred_saliency_scores"], [[0, 0, 0] for _ in range(wanted["duration"] // 2)]
            for clip, row in zip(wanted["relevant_clip_ids"], wanted["saliency_scores"], strict=True):
                table[clip] = row
            fitted = (scores + [0.0] * len(table))[: len(table)]
            precisions += [slow_precision([int(row[w] >= least) for row in table], fitted) for w in range(3)]
            best = scores.index(max(scores))
            hits.append(best < len(table) and max(table[best]) >= least)
        assert result[f"HL-min-{name}-mAP"] == pytest.approx(100 * np.mean(precisions), abs=0.006)
        assert result[f"HL-min-{name}-Hit1"] == pytest.approx(100 * np.mean(hits), abs=0.006)


TRUTH = {
    "qid": 1,
    "duration": 6,
    "relevant_windows": [[0, 2]],
    "relevant_clip_ids": [0],
    "saliency_scores": [[4, 4, 4]],
}
PREDICTION = {"qid": 1, "pred_relevant_windows": [[0, 2, 1.0]], "pred_saliency_scores": [1, 0, 0]}


@pytest.mark.parametrize(
    ("metrics", "prediction", "truth", "message"),
    [
        (moment_retrieval_metrics, {"qid": 2}, {}, r"1 queries have no prediction, such as qid 1"),
        (moment_retrieval_metrics, {"pred_relevant_windows": None}, {}, "qid 1 has no 'pred_relevant_windows'"),
        (moment_retrieval_metrics, {"pred_relevant_windows": [[0, 2]]}, {}, "must be a list of lists of 3 numbers"),
        (
            moment_retrieval_metrics,
            {"pred_relevant_windows": [[0, 2, "x"]]},
            {},
            "must be a list of lists of 3 numbers",
        ),
        (moment_retrieval_metrics, {"pred_relevant_windows": [[0, 2, math.nan]]}, {}, "aren't finite"),
        (moment_retrieval_metrics, {}, {"relevant_windows": []}, r"must be some \[start, end\] with start < end"),
        (
            moment_retrieval_metrics,
            {},
            {"relevant_windows": [[3, 3]]},
            r"must be some \[start, end\] with start < end",
        ),
        (highlight_metrics, {"pred_saliency_scores": []}, {}, "'pred_saliency_scores' is empty"),
        (highlight_metrics, {"pred_saliency_scores": [[1], [2]]}, {}, "must be a list of numbers"),
        (highlight_metrics, {}, {"relevant_clip_ids": [3]}, "clip 3 isn't among the 3 of its duration"),
        (highlight_metrics, {}, {"relevant_clip_ids": [0, 1]}, "2 'relevant_clip_ids' and 1 rows"),
        (highlight_metrics, {}, {"saliency_scores": [[4, 4]]}, "must be a list of lists of 3 numbers"),
        (highlight_metrics, {}, {"duration": None}, "qid 1 has no 'duration'"),
    ],
)
def test_what_cannot_be_scored_is_named(metrics, prediction, truth, message):
    """Which query, and what is wrong with it."""
    with pytest.raises(ValueError, match=message):
        metrics([PREDICTION | prediction], [TRUTH | truth])


def test_a_query_that_is_there_twice_or_not_at_all():
    """Neither in the predictions nor in the truth."""
    with pytest.raises(ValueError, match="The predictions have qid 1 twice"):
        moment_retrieval_metrics([PREDICTION, PREDICTION], [TRUTH])
    with pytest.raises(ValueError, match="queries have no truth, such as qid 2"):
        highlight_metrics([PREDICTION, PREDICTION | {"qid": 2}], [TRUTH])
    with pytest.raises(ValueError, match="The ground truth is empty"):
        highlight_metrics([], [])
