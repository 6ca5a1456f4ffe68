"""Data folders of strangers, and what several first runs make at once."""

import json
import multiprocessing
import os
import shutil
import signal
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from common.annotations import SHORTER_SIDE, decode_clips, iterate_clips, video_stream
from common.files import finished, is_made
from media_files import seconds_of as seconds_of_shade
from media_files import turned, write
from video_grounding.annotations import Annotation, read_annotations
from video_grounding.features import FRAMES_AT_ONCE, make_examples

from peft_read.trimodal.media import decode_frames


def entry(**changes):
    return {"video": "v/a.mp4", "query": "q", "split": "train", "relevant_windows": [[0, 1]]} | changes


def folder_of(path, *lines):
    """A data folder whose fourth line and those after it are the given ones, as bytes or as objects."""
    (path / "v").mkdir(parents=True)
    (path / "v" / "a.mp4").write_bytes(b"a video")
    good = [entry(split=split) for split in ("train", "validation", "test")]
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in [*good, *lines]]
    (path / "annotations.jsonl").write_bytes(b"\n".join(raw) + b"\n")
    return path


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside.mp4", "v/../../outside.mp4", "v/link.mp4", "out/a.mp4"])
def test_videos_stay_inside_the_folder(tmp_path, name):
    """No absolute path, no `..`, and no link leads out of it, neither of a file nor of a folder."""
    (tmp_path / "outside.mp4").write_bytes(b"of somebody else")
    (tmp_path / "a.mp4").write_bytes(b"likewise")
    folder = folder_of(tmp_path / "data", entry(video=name))
    (folder / "v" / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (folder / "out").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"annotations\.jsonl:4: the video .* lies outside of"):
        read_annotations(folder)


def test_paths_within_the_folder_are_taken(tmp_path):
    """Also by a link to the folder, a link within it, or a way around."""
    folder = folder_of(tmp_path / "data", entry(video="v/../v/a.mp4"), entry(video="link.mp4"))
    (folder / "link.mp4").symlink_to("v/a.mp4")
    (tmp_path / "link").symlink_to(folder)
    assert len(read_annotations(tmp_path / "link")) == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "lists or objects within each other"),
        (b'{"video": ' + b"1" * 100_000 + b"}", "not valid JSON"),
        (entry(video="v/a\0.mp4"), "`video` is no path of a file"),
        (entry(video="v/" * 500_000), "`video` is no path of a file: it has 1,000,000 characters"),
        (entry(query="\ud800"), "field 'query' holds half of a character"),
        (entry(relevant_windows=[[0, 10**400]]), "`relevant_windows` must be pairs of seconds"),
        (entry(relevant_windows=[[0, 1e308]]), "`relevant_windows` must be pairs of seconds"),
        (entry(relevant_windows=[[0, float("inf")]]), "`relevant_windows` must be pairs of seconds"),
        (entry(relevant_windows=[[float("nan"), 1]]), "`relevant_windows` must be pairs of seconds"),
    ],
)
def test_an_odd_line_is_named(tmp_path, line, message):
    """In a sentence that a terminal can show."""
    with pytest.raises(ValueError, match=rf"annotations\.jsonl:4: {message}") as error:
        read_annotations(folder_of(tmp_path / "data", line))
    assert len(str(error.value)) < 600


def test_lines_end_at_newlines_only_and_a_bom_is_read(tmp_path):
    queries = ["a\u2028b", "a\u2029b", "a\x85b", "a\x0cb", "a\x1cb"]
    raw = [json.dumps(entry(query=query), ensure_ascii=False).encode() + b"\r" for query in queries]
    folder = folder_of(tmp_path / "data", *raw)
    path = folder / "annotations.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [annotation.query for annotation in read_annotations(folder)][3:] == queries


def test_an_annotation_file_that_is_none(tmp_path):
    folder = folder_of(tmp_path / "data")
    for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo, os.mkdir):
        path = folder / "annotations.jsonl"
        path.unlink()
        make(path)
        with pytest.raises(FileNotFoundError, match=r"annotations\.jsonl isn't there"):
            read_annotations(folder)


def seconds_of(call):
    begun = time.process_time()
    call()
    return time.process_time() - begun


def test_many_lines_and_windows_take_a_time_that_grows_with_their_number(tmp_path):
    """Ten times as many take far less than a hundred times as long."""
    times, of_labels = [], []
    for count in (2_000, 20_000):
        windows = [[index / 1000, index / 1000 + 1e-4] for index in range(count)]
        folder = folder_of(tmp_path / str(count), *[entry()] * count, entry(relevant_windows=windows))
        times.append(seconds_of(lambda folder=folder: read_annotations(folder)))
        annotation = Annotation(Path(), "q", "train", windows, None, "line")
        of_labels.append(seconds_of(lambda annotation=annotation: annotation.labels(2_000, 0.01)))
    assert times[1] < 30 * times[0] + 0.5
    assert of_labels[1] < 30 * of_labels[0] + 0.5


def test_windows_that_overlap_count_once():
    """The share of a clip that lies in any window; that of one in many pieces, too."""

    def labels(*windows):
        return Annotation(Path(), "q", "train", [*map(list, windows)], None, "line").labels(3, 1.0).tolist()

    assert labels((0, 0.4), (0.1, 0.4)) == [0, 0, 0]
    assert labels((0.1, 0.3), (0, 0.2), (0.6, 0.8), (1.6, 2.4), (2.9, 99)) == [1, 0, 1]
    assert labels((2.5, 3), (1, 1.5), (5, 6)) == [0, 1, 1]


def write_video(path, size, clips):
    """Two frames a second, of which the second one of each is the brighter, the later it is."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height = size
        stream.pix_fmt, stream.options = "yuv420p", {"preset": "ultrafast"}
        for index in range(2 * clips):
            frame = np.full((size[1], size[0], 3), index // 2 * 10 % 256 if index % 2 else 0, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_frames_are_made_smaller_as_they_come(tmp_path):
    """In proportion, without one at full size being kept."""
    path = write_video(tmp_path / "a.mp4", (1920, 1080), 12)
    tracemalloc.start()
    frames = decode_clips(path, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert frames.shape == (12, SHORTER_SIDE, round(1920 * SHORTER_SIDE / 1080), 3)
    assert np.abs(frames.mean((1, 2, 3)) - 10 * np.arange(12)).max() < 3
    assert peak < 2.5 * frames.nbytes + 1080 * 1920 * 3


UNEVEN = {
    "still, then fast": ([0.0, *(6 + i / 10 for i in range(60))], 2.0),
    "still in the middle": ([i / 10 for i in range(30)] + [9 + i / 10 for i in range(30)], 2.0),
    "still at the end": ([i / 10 for i in range(30)] + [11.9], 2.0),
    "slower than clips": (list(range(12)), 0.5),
    "slower at the end": ([i / 20 for i in range(20)] + [1 + i * 0.5 for i in range(22)], 0.5),
    "late": ([3 + i / 10 for i in range(90)], 1.0),
}


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("case", UNEVEN)
def test_clips_show_what_a_player_shows_at_their_middle(case, ending, tmp_path):
    """Against the definition, whatever the frame rate does: the last frame that began before."""
    begins, clip_seconds = UNEVEN[case]
    frames = decode_clips(Path(write(tmp_path / f"a.{ending}", begins, 12.0)), clip_seconds)
    middles = (np.arange(round(12 / clip_seconds)) + 0.5) * clip_seconds
    expected = [max((begin for begin in begins if begin <= middle), default=begins[0]) for middle in middles]
    assert len(frames) == len(expected)
    assert [seconds_of_shade(frame, 12.0) for frame in frames] == pytest.approx(expected, abs=0.12)


def test_streams_without_time_stamps_and_with_a_clock_of_their_own(tmp_path):
    for name, codec in (("a.h264", "libx264"), ("a.ts", "mpeg4")):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for index in range(100):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 2 * index, np.uint8), format="rgb24")
                frame.pts = index + 36_000 * 25 * name.endswith(".ts")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        shades = decode_clips(tmp_path / name, 1.0).mean((1, 2, 3))
        assert shades.tolist() == pytest.approx([24, 74, 124, 174], abs=5)


def test_time_stamps_that_jump_by_days_are_refused(tmp_path):
    images = [np.zeros((32, 32, 3), np.uint8)] * 3
    path = Path(write(tmp_path / "a.mkv", [0.0, 0.1, 1e5], images=images, codec="libx264"))
    with pytest.raises(ValueError, match=r"a\.mkv .*time stamps jump by 100000 seconds at 0 s"):
        decode_clips(path, 1.0)


def test_clips_of_a_phones_video_are_upright(tmp_path):
    """As the package reads it, made smaller or not."""
    for size in ((32, 64), (400, 800)):
        picture = np.zeros((*size, 3), np.uint8)
        picture[: size[0] // 2, : size[1] // 2] = 255
        path = Path(turned(write(tmp_path / "a.mp4", images=[picture] * 8, length=0.8, size=size), (0, 1, -1, 0)))
        (frame,) = decode_clips(path, 0.8)
        assert frame.shape == (min(2 * SHORTER_SIDE, size[1]), min(SHORTER_SIDE, size[0]), 3)
        expected = np.zeros(frame.shape)
        expected[: frame.shape[0] // 2, frame.shape[1] // 2 :] = 255
        assert np.abs(frame - expected).mean() < 10


def test_a_cover_is_no_video(tmp_path):
    """The first video stream counts that is none; a sound file with a cover has none."""
    stream = lambda cover: SimpleNamespace(  # noqa: E731
        disposition=av.stream.Disposition.attached_pic if cover else av.stream.Disposition(0), height=32, width=32
    )
    picture, video = stream(True), stream(False)
    of = lambda *streams: SimpleNamespace(streams=SimpleNamespace(video=streams))  # noqa: E731
    assert video_stream(of(picture, video), Path("a.mp4")) is video
    with pytest.raises(ValueError, match=r"a\.mp3 has no video stream"):
        video_stream(of(picture), Path("a.mp3"))


def test_a_long_video_is_encoded_in_parts(tmp_path):
    """What the encoder gives for each frame is what it gives for all of them at once."""
    path = write_video(tmp_path / "a.mp4", (32, 48), 2 * FRAMES_AT_ONCE + 3)
    given = []

    def encode(frames):
        given.append(len(frames))
        return torch_means(frames)

    class Tokenizer:
        def __call__(self, query, return_special_tokens_mask):
            return {"input_ids": [1], "special_tokens_mask": [0]}

    (example,) = make_examples([Annotation(path, "q", "train", [[0, 1]], None, "line")], encode, Tokenizer(), 1.0)
    assert given == [FRAMES_AT_ONCE, FRAMES_AT_ONCE, 3]
    assert (example["frame_features"] == torch_means(decode_clips(path, 1.0))).all()
    assert next(iterate_clips(path, 1.0)).shape == (48, 32, 3)


def torch_means(frames):
    import torch

    return torch.from_numpy(frames.mean((1, 2))).float()


@pytest.mark.parametrize(
    "content",
    [b"", b"text", b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", b"ffconcat version 1.0\nfile /etc/hostname\n"],
    ids=["empty", "text", "playlist", "ffconcat"],
)
def test_files_that_are_no_videos_are_named(tmp_path, content):
    path = tmp_path / "odd.mp4"
    path.write_bytes(content)
    for read in (lambda: decode_clips(path, 1.0), lambda: decode_frames(path, 4)):
        with pytest.raises(ValueError, match=r"odd\.mp4 can't be (decoded|read) as a"):
            read()


def test_a_damaged_video_and_one_of_huge_frames_are_named(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", (32, 32), 8).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "huge.ppm").write_bytes(b"P6\n30000 30000\n255\n" + bytes(1000))
    for name in ("half.mp4", "huge.ppm"):
        with pytest.raises(ValueError, match=name):
            decode_clips(tmp_path / name, 1.0)


# What is made once, by processes that are forked: they do nothing but write a file.
FORK = multiprocessing.get_context("fork")


def make(folder, text, ready, go):
    if is_made(folder):
        return
    with finished(folder) as draft:
        (draft / "a").write_text(text)
        ready.set()
        go.wait(60)


def start(folder, text):
    ready, go = FORK.Event(), FORK.Event()
    process = FORK.Process(target=make, args=(folder, text, ready, go))
    process.start()
    assert ready.wait(60)
    return process, go


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks beside threads
def test_two_first_runs_at_once(tmp_path):
    """The second takes what the first has made; neither's draft is touched while it runs."""
    folder = tmp_path / "videos"
    (first, go_first), (second, go_second) = start(folder, "first"), start(folder, "second")
    assert not is_made(folder)
    for process, go in ((first, go_first), (second, go_second)):
        go.set()
        process.join(60)
        assert process.exitcode == 0
    assert (folder / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["videos"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks beside threads
def test_what_a_killed_run_leaves_is_cleared(tmp_path):
    """By the next run, whether the folder is there or not; files of other names stay."""
    folder = tmp_path / "videos"
    (tmp_path / ".videos-mine").mkdir()
    for _ in range(2):
        process, _ = start(folder, "killed")
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert len(os.listdir(tmp_path)) == 3
        with finished(folder) as draft:
            (draft / "a").write_text("whole")
        assert (folder / "a").read_text() == "whole"
        assert sorted(os.listdir(tmp_path)) == [".videos-mine", "videos"]
        shutil.rmtree(folder)


def test_a_fault_leaves_no_draft(tmp_path):
    def interrupted():
        with finished(tmp_path / "videos"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []
