"""LSTTA's mathematics as loops over samples, frames and tokens in float64, and streams to compare them on."""

import math

import torch
from torch.nn import functional as F

from peft_read.lstta.interaction import TIME_PREFERENCE, FrameFilter, Stream
from peft_read.lstta.naive import Token, naive_exchange
from peft_read.lstta.windows import plan_windows


R, HEADS, WINDOW, AUDIO_WINDOWS = 8, 2, 3, 4
# Times, positions and weights of windows are float32; the fastest code multiplies a position by 200.
CLOSE = {"rtol": 0, "atol": 1e-5}
CPU = torch.device("cpu")
# Steps and tokens per step of towers with a time axis; untimed tokens of each.
TIMED = {"vision": (8, 3), "audio": (11, 2)}
UNTIMED = {"audio": 1, "text": 5}


def mask_of(rows):
    """`(batch, length)` bool from strings such as `"1101"`."""
    return torch.tensor([[place == "1" for place in row] for row in rows])


def make_streams(towers=("vision", "audio", "text"), batch=3, text_mask=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(*shape):
        return torch.randn(batch, *shape, 3 * R, generator=generator, dtype=torch.float64)

    made = {
        tower: Stream(
            tokens(*TIMED[tower]) if tower in TIMED else None,
            tokens(UNTIMED[tower]) if tower in UNTIMED else None,
            text_mask if tower == "text" else None,
        )
        for tower in ("vision", "audio", "text")
    }
    return {tower: made[tower] for tower in towers}


def plan(streams, masks=None, batch=3, window=WINDOW):
    steps = {tower: stream.timed.shape[1] for tower, stream in streams.items() if stream.timed is not None}
    given = {tower: mask for tower, mask in (masks or {}).items() if tower in steps}
    return plan_windows(steps, given, batch=batch, window=window, num_audio_windows=AUDIO_WINDOWS, device=CPU)


def make_filter(seed=3):
    torch.manual_seed(seed)
    frame_filter = FrameFilter(R, HEADS).double()
    for parameter in frame_filter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return frame_filter


def steps_in_windows(valid_frames, valid_sound, window):
    """`{tower: [(step, window, time)]}` of one clip, from lists of bools; None where a tower isn't there."""
    placed = {}
    frames = [t for t, valid in enumerate(valid_frames or []) if valid]
    sound = [t for t, valid in enumerate(valid_sound or []) if valid]
    if frames:
        placed["vision"] = [(t, (t - frames[0]) // window, (t - frames[0]) % window) for t in frames]
    if sound:
        placed["audio"] = []
        extent = sound[-1] - sound[0] + 1
        for t in sound:
            middle = (t - sound[0]) * 2 + 1  # in halves of a step
            if frames:
                frame = middle * (frames[-1] - frames[0] + 1) // (2 * extent)
                placed["audio"].append((t, frame // window, frame % window))
            else:
                index = middle * AUDIO_WINDOWS // (2 * extent)
                time = (middle * AUDIO_WINDOWS / (2 * extent) - index) * window
                placed["audio"].append((t, index, time))
    return placed


def sinusoids(x, low, high, pairs):
    ratio = [low * (high / low) ** (i / (pairs - 1) if pairs > 1 else 0) for i in range(pairs)]
    return torch.tensor([math.sin(x * f) for f in ratio] + [math.cos(x * f) for f in ratio], dtype=torch.float64)


def naive_attend(query, keys):
    """One query `(r,)`, a list of `(key, value, bias)`: heads one by one, and the zero key."""
    size = R // HEADS
    told = []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        logits = [torch.tensor(0.0, dtype=torch.float64)]
        logits += [query[part] @ key[part] / math.sqrt(size) + bias for key, _, bias in keys]
        values = [torch.zeros(size, dtype=torch.float64)] + [value[part] for _, value, _ in keys]
        told.append(sum(w * v for w, v in zip(torch.stack(logits).softmax(0), values, strict=True)))
    return torch.cat(told)


def naive_short_term(streams, masks, batch, window, importance=None):
    """`{tower: (timed, untimed)}`, one clip after another by `naive_exchange`."""
    out = {
        tower: [
            None if x is None else torch.zeros(*x.shape[:-1], R, dtype=torch.float64) for x in (s.timed, s.untimed)
        ]
        for tower, s in streams.items()
    }
    for b in range(batch):
        valid = {
            tower: (masks[tower][b].tolist() if tower in masks else [True] * s.timed.shape[1])
            for tower, s in streams.items()
            if s.timed is not None
        }
        placed = steps_in_windows(valid.get("vision"), valid.get("audio"), window)
        leading = placed.get("vision") or placed.get("audio", [])
        by_frame = importance is not None and "vision" in placed
        weights = [
            sum(importance[b, t].item() if by_frame else 1 for t, index, _ in leading if index == w)
            for w in range(1 + max((w for steps in placed.values() for _, w, _ in steps), default=0))
        ]
        total = sum(weights)
        tokens, places = {}, {}
        for tower, s in streams.items():
            steps = placed.get(tower, [])
            filtered = tower == "vision" and importance is not None
            places[tower] = [(0, (b, t, n)) for t, *_ in steps for n in range(s.timed.shape[2])]
            tokens[tower] = [
                Token(*s.timed[b, t, n].split(R), w, time, importance[b, t].item() if filtered else 1.0)
                for t, w, time in steps
                for n in range(s.timed.shape[2])
            ]
            for n in range(0 if s.untimed is None else s.untimed.shape[1]):
                visible = s.untimed_mask is None or bool(s.untimed_mask[b, n])
                places[tower].append((1, (b, n)))
                tokens[tower].append(Token(*s.untimed[b, n].split(R), visible=visible))
        told = naive_exchange(
            tokens,
            [w / total for w in weights] if total else [1.0],
            frames=window,
            num_heads=HEADS,
            time_preference=TIME_PREFERENCE,
        )
        for tower, messages in told.items():
            for (kind, where), message in zip(places[tower], messages, strict=True):
                out[tower][kind][where] = message
    return out


def naive_sound_at_frames(streams, masks, b, tower):
    """Keys and values of the means of one clip's sound over the time of each frame."""
    valid = {
        name: masks[name][b].tolist() if name in masks else [True] * streams[name].timed.shape[1]
        for name in ("vision", tower)
    }
    placed = steps_in_windows(valid["vision"], valid[tower], WINDOW)[tower] if any(valid[tower]) else []
    first = placed[0][0] if placed else 0
    extent = placed[-1][0] - first + 1 if placed else 1
    keys = []
    for frame in sorted({(w, math.floor(time)) for _, w, time in placed}):
        steps = [t for t, w, time in placed if (w, math.floor(time)) == frame]
        _, k, v = torch.stack([streams[tower].timed[b, t].mean(0) for t in steps]).mean(0).split(R)
        position = sum((t - first + 0.5) / extent for t in steps) / len(steps)
        keys.append((k + sinusoids(position, math.pi, 64 * math.pi, R // 2), v, 0.0))
    return keys


def naive_log_importance(frame_filter, streams, masks, batch):
    """One frame after another, from the filter's own layers."""
    frames = streams["vision"].timed
    out = torch.full(frames.shape[:2], -math.inf, dtype=torch.float64)

    def positions(tower, b):
        steps = streams[tower].timed.shape[1]
        valid = [t for t in range(steps) if tower not in masks or masks[tower][b, t]]
        extent = valid[-1] - valid[0] + 1 if valid else 1
        codes = {t: sinusoids((t - valid[0] + 0.5) / extent, math.pi, 64 * math.pi, R // 2) for t in valid}
        return codes

    for b in range(batch):
        codes = positions("vision", b)
        x = {t: frame_filter.normalizer(frames[b, t].mean(0)[2 * R :]) + codes[t] for t in codes}
        keys = []
        for t in x:
            _, k, v = frame_filter.projections(x[t]).split(R)
            keys.append((k, v, 0.0))
        context = []
        for tower, s in streams.items():
            if tower == "vision":
                continue
            if s.timed is not None:
                context += naive_sound_at_frames(streams, masks, b, tower)
            for n in range(0 if s.untimed is None else s.untimed.shape[1]):
                if s.untimed_mask is None or s.untimed_mask[b, n]:
                    _, k, v = s.untimed[b, n].split(R)
                    context.append((k, v, 0.0))
        for t in x:
            h = x[t] + naive_attend(frame_filter.projections(x[t])[:R], keys)
            h = h + naive_attend(frame_filter.context_query(h), context)
            score = frame_filter.scorer(F.gelu(frame_filter.enlarger(h)))
            out[b, t] = F.logsigmoid(score).squeeze()
    return out
