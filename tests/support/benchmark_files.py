"""Benchmark folders with random features of the right shapes, and annotations of a few made-up videos."""

import json

import numpy as np


def write_arrays(folder, arrays):
    """Arrays by their file's path: `(rows, size)` as npy, or as npz under a key in a dict."""
    rng = np.random.default_rng(0)
    for path, shape in arrays.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(shape, dict):
            np.savez(folder / path, **{key: rng.normal(size=s).astype(np.float16) for key, s in shape.items()})
        else:
            np.save(folder / path, rng.normal(size=shape).astype(np.float32))
    return folder


def qvhighlights_line(change=None, **fields):
    line = {
        "qid": 7,
        "query": "A man repairs a bike.",
        "duration": 150,
        "vid": "abc_-d_60.0_210.0",
        "relevant_windows": [[10, 16], [40, 44]],
        "relevant_clip_ids": [5, 6, 7, 20, 21],
        "saliency_scores": [[3, 2, 4], [4, 4, 3], [1, 2, 2], [0, 3, 2], [2, 2, 2]],
    }
    line = line | fields | (change or {})
    return {key: value for key, value in line.items() if value is not None}


def write_qvhighlights(folder, change=None, rows=(75, 75), duration=150, tokens=9):
    """Four training queries, two to validate and a test query without its truth, of two videos."""
    videos, arrays = ("abc_-d_60.0_210.0", "efg_0.0_150.0"), {}
    for video in videos:
        arrays[f"slowfast_features/{video}.npz"] = {"features": (rows[0], 2304)}
        arrays[f"clip_features/{video}.npz"] = {"features": (rows[1], 512)}
    lines = [qvhighlights_line(change if n == 0 else None, duration=duration) for n in range(7)]
    for number, line in enumerate(lines):
        if number:
            line |= {"qid": 7 + number, "vid": videos[number % 2], "duration": duration}
        arrays[f"clip_text_features/qid{7 + number}.npz"] = {
            "last_hidden_state": (tokens, 512),
            "pooler_output": (512,),
        }
    for name in ("relevant_windows", "relevant_clip_ids", "saliency_scores"):
        del lines[6][name]
    for split, some in {"train": lines[:4], "val": lines[4:6], "test": lines[6:]}.items():
        text = "".join(json.dumps(line) + "\n" for line in some)
        (folder / f"highlight_{split}_release.jsonl").write_text(text, encoding="utf-8")
    return write_arrays(folder, arrays)


def _write_domains(folder, name, records, domains):
    splits = {domain: {"train": [f"{domain}0", f"{domain}1"], "val": [f"{domain}2"]} for domain in domains}
    (folder / f"{name}_anno.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / f"{name}_splits.json").write_text(json.dumps(splits), encoding="utf-8")


def _pictures_and_sound(video, rows):
    return {
        f"video_features/{video}_rgb.npy": (rows[0], 1024),
        f"video_features/{video}_opt.npy": (rows[1], 1024),
        f"audio_features/{video}.npy": (rows[2], 2048),
    }


def write_youtube(folder, match=(-1, 0, 1, 1), rows=(4, 4, 4), domains=("dog", "surfing")):
    """Two training videos and one to validate of each domain."""
    videos = [f"{domain}{n}" for domain in domains for n in range(3)]
    _write_domains(folder, "youtube", {v: {"fps": 25, "frames": 300, "match": list(match)} for v in videos}, domains)
    return write_arrays(folder, {k: v for video in videos for k, v in _pictures_and_sound(video, rows).items()})


def write_tvsum(folder, clips=4, domain="VT"):
    """Two training videos and one to validate of a domain."""
    rng = np.random.default_rng(0)
    videos = [f"{domain}{n}" for n in range(3)]
    records = {v: {"title": "t", "anno": rng.integers(1, 6, size=(clips, 20)).tolist()} for v in videos}
    _write_domains(folder, "tvsum", records, [domain])
    arrays = {k: v for video in videos for k, v in _pictures_and_sound(video, (clips,) * 3).items()}
    return write_arrays(folder, arrays | {f"query_features/{video}.npz": {"token": (6, 512)} for video in videos})


def write_charades(folder, lines):
    """The same lines to train and to test on, about the video AAAAA of four seconds."""
    for split in ("train", "test"):
        (folder / f"charades_sta_{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rng = np.random.default_rng(1)
    vectors = [
        f"{word} {' '.join(f'{x:.4f}' for x in rng.normal(size=300))}" for word in ("a", "person", "opens", "door")
    ]
    (folder / "glove.6B.300d.txt").write_text("\n".join(vectors) + "\n", encoding="utf-8")
    sizes = {"rgb": 4096, "opt": 4096, "audio": 2048}
    return write_arrays(
        folder, {f"{kind}_features/AAAAA.npy": (25 - (kind == "audio"), s) for kind, s in sizes.items()}
    )


def write_how2(folder, rows=5):
    """Two videos in each split."""
    arrays = {}
    for split in ("sum_train", "sum_cv", "sum_devtest"):
        (folder / split).mkdir()
        transcripts = "a1 welcome back today we will tune a guitar .\na2 we will bake bread .\n"
        (folder / split / "tran.tok.txt").write_text(transcripts, encoding="utf-8")
        (folder / split / "desc.tok.txt").write_text("a1 how to tune a guitar .\na2 how to bake .\n", encoding="utf-8")
    for video in ("a1", "a2"):
        arrays[f"video_action_features/{video}.npy"] = (rows, 2048)
    return write_arrays(folder, arrays)
