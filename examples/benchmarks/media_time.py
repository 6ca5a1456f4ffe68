"""What it costs to take a few frames out of a long video: by seeking, and frame by frame.

    python examples/benchmarks/media_time.py

Makes a video of a minute in 720p at 25 frames a second, whose pictures move, and takes 8 frames of it as
`TrimodalProcessor` does. CPU seconds, of which decoding may use several threads.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import av
import numpy as np

from peft_read.trimodal.media import decode_frames


FPS, HEIGHT, WIDTH = 25, 720, 1280


def write(path: Path, seconds: int, between_keys: int) -> None:
    """A video of noise that moves, with a key frame every `between_keys` seconds."""
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    options = {"preset": "ultrafast", "crf": "28", "g": str(FPS * between_keys)}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(seconds * FPS):
            frame = av.VideoFrame.from_ndarray(np.roll(noise, 3 * index, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def one_by_one(path: Path, wanted: int) -> int:
    """Decode all frames, and make pictures of a few."""
    with av.open(str(path)) as container:
        frames = container.streams.video[0].frames
        places = {int((part + 0.5) * frames / wanted) for part in range(wanted)}
        decoded = enumerate(container.decode(container.streams.video[0]))
        return len([frame.to_ndarray(format="rgb24") for index, frame in decoded if index in places])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="length of the video (default: 60)")
    parser.add_argument("--frames", type=int, default=8, help="frames to take (default: 8)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(
            f"| {args.frames} frames of {args.seconds} s in 720p, CPU s | frame by frame | by seeking |\n|---|---|---|"
        )
        for between_keys in (1, 10):
            path = Path(folder) / f"{between_keys}.mp4"
            write(path, args.seconds, between_keys)
            spent = []
            for read in (one_by_one, decode_frames):
                started = time.process_time()
                read(path, args.frames)
                spent.append(f"{time.process_time() - started:.1f}")
            print(f"| a key frame every {between_keys} s | {' | '.join(spent)} |")


if __name__ == "__main__":
    main()
