"""The recurrences as Triton kernels: one program for each chunk of each sequence, its state in registers.

Every chunk first runs from a guess, what the steps before it lead to from zero. Then each compares what it began with
to what its predecessor ended with, and runs again where they differ; in such a round a program that has nothing to do
ends at once. A last launch goes through every sequence from chunk to chunk and mends what is still wrong. So the
result is that of the sequential scan, and nothing waits for the GPU. A backward pass, a linear recurrence in reverse
time, goes the same way.
"""

import triton
import triton.language as tl


# Below, `h` is a sequence's state and `m` an LSTM's memory, or what they receive in the backward pass. `tensors` are
# inputs (there: gradients), recurrent matrix, recurrent bias, first state (LSTM: memory), states, memories, kept
# vectors, deltas; a token is a step of a sequence in them. `lanes` count the state's elements, up to a power of two.


@triton.jit
def _tanh(x):
    """To a few roundings, near zero too, where one minus the exponential has none."""
    power = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - power) / (1.0 + power)
    square = x * x
    near = 1.0 + square * (-0.33333333 + square * (0.13333333 + square * (-0.053968254 + square * 0.021869489)))
    return tl.where(tl.abs(x) < 0.3, x * near, tl.where(x < 0.0, -far, far))


@triton.jit
def _load(pointer, inside):
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _times(matrix, vector):
    return tl.sum(matrix * vector[None, :], axis=1)


@triton.jit
def _times_transposed(matrix, vector):
    return tl.sum(matrix * vector[:, None], axis=0)


@triton.jit
def _step(kind: tl.constexpr, keep: tl.constexpr, h, m, token, lanes, size, saved, matrices, bias, tensors):
    """One step on; its results are stored if `saved` is the state's size, not if it is 0."""
    inputs, _, _, _, states, memories, kept, _ = tensors
    w0, w1, w2, w3 = matrices
    inside = lanes < size
    save = lanes < saved
    gates: tl.constexpr = 1 if kind == "rnn_tanh" or kind == "rnn_relu" else (3 if kind == "gru" else 4)
    drive = inputs + token * gates * size + lanes
    a = _load(drive, inside) + _times(w0, h)
    if kind == "rnn_tanh":
        h = _tanh(a)
    elif kind == "rnn_relu":
        h = tl.where(a < 0.0, 0.0, a)  # keeps NaN
    else:
        a = tl.sigmoid(a)
        b = tl.sigmoid(_load(drive + size, inside) + _times(w1, h))
        c = _load(drive + 2 * size, inside)
        if kind == "gru":  # gates reset and update, the new state and its recurrent part
            d = _times(w2, h) + bias
            c = _tanh(c + a * d)
            h = c + b * (h - c)
        else:  # gates in, forget, new, out
            c = _tanh(c + _times(w2, h))
            d = tl.sigmoid(_load(drive + 3 * size, inside) + _times(w3, h))
            m = b * m + a * c
            h = d * _tanh(m)
            tl.store(memories + token * size + lanes, m, mask=save)
        if keep:
            place = kept + token * 4 * size + lanes
            tl.store(place, a, mask=save)
            tl.store(place + size, b, mask=save)
            tl.store(place + 2 * size, c, mask=save)
            tl.store(place + 3 * size, d, mask=save)
    h = tl.where(inside, h, 0.0)
    m = tl.where(inside, m, 0.0)
    tl.store(states + token * size + lanes, h, mask=save)
    return h, m


@triton.jit
def _step_back(kind: tl.constexpr, h, m, row, token, time, lanes, size, saved, matrices, tensors):
    """One step back: from what the state after it receives to what the state before it does."""
    grads, _, _, origin, states, memories, kept, deltas = tensors
    w0, w1, w2, w3 = matrices
    inside = lanes < size
    save = lanes < saved
    h += _load(grads + token * size + lanes, inside)
    if kind == "rnn_tanh" or kind == "rnn_relu":
        state = _load(states + token * size + lanes, inside)
        da = tl.where(state > 0.0, h, 0.0) if kind == "rnn_relu" else h * (1.0 - state * state)
        h = _times_transposed(w0, da)
        tl.store(deltas + token * size + lanes, da, mask=save)
    else:
        place = kept + token * 4 * size + lanes
        a = _load(place, inside)
        b = _load(place + size, inside)
        c = _load(place + 2 * size, inside)
        d = _load(place + 3 * size, inside)
        is_first = token == row * time
        earlier = (token - 1) * size + lanes
        within = lanes < tl.where(is_first, 0, size)
        before = _load(origin + row * size + lanes, lanes < tl.where(is_first, size, 0))
        if kind == "gru":
            before += _load(states + earlier, within)
            dc = h * (1.0 - b) * (1.0 - c * c)
            db = h * (before - c) * b * (1.0 - b)
            dd = dc * a
            da = dd * d * (1.0 - a)
            h = h * b + _times_transposed(w0, da) + _times_transposed(w1, db) + _times_transposed(w2, dd)
        else:
            before += _load(memories + earlier, within)
            shown = _tanh(_load(memories + token * size + lanes, inside))
            dd = h * shown * d * (1.0 - d)
            m += h * d * (1.0 - shown * shown)
            da = m * c * a * (1.0 - a)
            db = m * before * b * (1.0 - b)
            dc = m * a * (1.0 - c * c)
            m = m * b
            h = _times_transposed(w0, da) + _times_transposed(w1, db)
            h += _times_transposed(w2, dc) + _times_transposed(w3, dd)
        place = deltas + token * 4 * size + lanes
        tl.store(place, da, mask=save)
        tl.store(place + size, db, mask=save)
        tl.store(place + 2 * size, dc, mask=save)
        tl.store(place + 3 * size, dd, mask=save)
    return h, m


@triton.jit
def _run(
    kind: tl.constexpr, backward: tl.constexpr, keep: tl.constexpr, h, m, row, begin, end, saved, time, lanes, size,
    tensors,
):  # fmt: skip
    """Steps `begin` to `end`, counted in the direction of the run."""
    _, weight, recurrent_bias, _, _, _, _, _ = tensors
    inside = lanes < size
    square = lanes[:, None] * size + lanes[None, :]
    corner = inside[:, None] & inside[None, :]
    w0 = _load(weight + square, corner)
    w1 = w0
    w2 = w0
    w3 = w0
    bias = h
    if kind == "gru" or kind == "lstm":
        w1 = _load(weight + size * size + square, corner)
        w2 = _load(weight + 2 * size * size + square, corner)
    if kind == "lstm":
        w3 = _load(weight + 3 * size * size + square, corner)
    if kind == "gru":
        bias = _load(recurrent_bias + lanes, inside)
    matrices = (w0, w1, w2, w3)
    for i in tl.range(begin, end, num_stages=3):
        if backward:
            token = row * time + (time - 1 - i)
            h, m = _step_back(kind, h, m, row, token, time, lanes, size, saved, matrices, tensors)
        else:
            h, m = _step(kind, keep, h, m, row * time + i, lanes, size, saved, matrices, bias, tensors)
    return h, m


@triton.jit
def _differs(handed, begun, tolerance, scale, axis: tl.constexpr):
    """Whether states differ by more than a few roundings of the largest, or aren't finite: 1 or 0 for each element."""
    allowed = tolerance * tl.maximum(tl.max(tl.abs(handed), axis=axis), scale)
    allowed = tl.where(allowed < 1e30, allowed, 0.0)
    if axis == 1:
        allowed = allowed[:, None]
    return tl.where(tl.abs(handed - begun) <= allowed, 0, 1)


@triton.jit
def _mend_chunk(
    kind: tl.constexpr, backward: tl.constexpr, keep: tl.constexpr, length: tl.constexpr, chunk, row, time, lanes,
    wide, size, tolerance, scale, begun, handed, ended, tensors,
):  # fmt: skip
    """Run a chunk again if it began with something else than what its predecessor `handed` over."""
    both = wide < 2 * size
    got = _load(handed + wide, both)
    had = _load(begun + wide, both)
    if tl.max(_differs(got, had, tolerance, scale, 0), axis=0) > 0:
        tl.store(begun + wide, got, mask=both)
        inside = lanes < size
        h = _load(handed + lanes, inside)
        m = _load(handed + size + lanes, inside)
        begin = chunk * length
        end = tl.minimum(begin + length, time)
        h, m = _run(kind, backward, keep, h, m, row, begin, end, size, time, lanes, size, tensors)
        tl.store(ended + lanes, h, mask=inside)
        tl.store(ended + size + lanes, m, mask=inside)


@triton.jit(do_not_specialize=["time", "count"])
def all_chunks(
    tensors, start, scales, begun, handed, ended, time, size, count, tolerance,
    kind: tl.constexpr, backward: tl.constexpr, keep: tl.constexpr, length: tl.constexpr, padded: tl.constexpr,
    is_first: tl.constexpr,
):  # fmt: skip
    """Every chunk at once: the first time from a guess, then those whose predecessor ended with something else."""
    program = tl.program_id(0)
    chunk = program % count
    row = (program // count).to(tl.int64)
    lanes = tl.arange(0, padded)
    place = (row * count + chunk) * 2 * size
    if is_first:
        begin = chunk * length
        guess = tl.maximum(begin - length, 0)
        end = tl.minimum(begin + length, time)
        inside = lanes < size
        real = lanes < tl.where(guess == 0, size, 0)
        h = _load(start + row * 2 * size + lanes, real)
        m = _load(start + row * 2 * size + size + lanes, real)
        h, m = _run(kind, backward, keep, h, m, row, guess, begin, 0, time, lanes, size, tensors)
        tl.store(begun + place + lanes, h, mask=inside)
        tl.store(begun + place + size + lanes, m, mask=inside)
        h, m = _run(kind, backward, keep, h, m, row, begin, end, size, time, lanes, size, tensors)
        tl.store(ended + place + lanes, h, mask=inside)
        tl.store(ended + place + size + lanes, m, mask=inside)
    else:
        wide = tl.arange(0, 2 * padded)
        both = wide < 2 * size
        tl.store(ended + place + wide, _load(handed + place + wide, both), mask=both)
        tl.debug_barrier()  # what is stored here may be overwritten there, by other threads
        if chunk > 0:
            _mend_chunk(
                kind, backward, keep, length, chunk, row, time, lanes, wide, size, tolerance, tl.load(scales + row),
                begun + place, handed + place - 2 * size, ended + place, tensors,
            )  # fmt: skip


@triton.jit(do_not_specialize=["time", "count"])
def one_after_another(
    tensors, scales, begun, ended, time, size, count, tolerance,
    kind: tl.constexpr, backward: tl.constexpr, keep: tl.constexpr, length: tl.constexpr, padded: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Every sequence from chunk to chunk, where any began with something else than what its predecessor ended with."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, padded)
    wide = tl.arange(0, 2 * padded)
    scale = tl.load(scales + row)
    for first in range(1, count, block):
        chunks = first + tl.arange(0, block)
        places = (row * count + chunks)[:, None] * 2 * size + wide[None, :]
        present = (chunks < count)[:, None] & (wide < 2 * size)[None, :]
        got = _load(ended + places - 2 * size, present)
        had = _load(begun + places, present)
        if tl.max(tl.max(_differs(got, had, tolerance, scale, 1), axis=1), axis=0) > 0:
            for chunk in range(first, tl.minimum(first + block, count)):
                place = (row * count + chunk) * 2 * size
                _mend_chunk(
                    kind, backward, keep, length, chunk, row, time, lanes, wide, size, tolerance, scale,
                    begun + place, ended + place - 2 * size, ended + place, tensors,
                )  # fmt: skip
                tl.debug_barrier()  # the next chunk reads what this one's threads have written
