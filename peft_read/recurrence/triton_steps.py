"""The recurrences' steps as Triton functions, forward and backward, with the state and the matrices in registers.

`h` is a sequence's state and `m` an LSTM's memory; in the backward pass they are the gradients of both. A token is a
step of a sequence in the tensors. `lanes` count the state's elements, up to a power of two: those behind the state's
size are zero. `tensors` are

- the inputs, `(tokens, gates * size)`, in the backward pass the gradients of the states, `(tokens, size)`;
- the first state and the first memory of each sequence, or None for zeros;
- the states, `(tokens, size)`;
- kept vectors, `(tokens, vectors * size)`: what a gated step has computed, for the backward pass;
- the record, `(tokens, vectors * size)`: what a step of the backward pass sends into its gates, once as their inputs
  receive it and once as the state before does, where these differ; and behind it the state before.
"""

import triton
import triton.language as tl


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
    return tl.load(pointer, mask=inside, other=0.0)


@triton.jit
def _load_row(pointer, row, lanes, size, limit):
    """Row of a matrix as wide as the state, up to `limit`; zeros if there is no matrix."""
    if pointer is None:
        return tl.zeros([lanes.shape[0]], tl.float32)
    else:
        return _load(pointer + row * size + lanes, lanes < limit)


@triton.jit
def _load_matrices(kind: tl.constexpr, weight, across, gate, lanes, size):
    """One matrix for each gate: its column is the element of the product, its row that of the vector.

    A thread then has whole columns, and needs no other thread's part of a product.
    """
    inside = lanes < size
    square = lanes[:, None] * across + lanes[None, :]
    corner = inside[:, None] & inside[None, :]
    w0 = _load(weight + square, corner)
    w1 = w0
    w2 = w0
    w3 = w0
    if kind == "gru" or kind == "lstm":
        w1 = _load(weight + gate + square, corner)
        w2 = _load(weight + 2 * gate + square, corner)
    if kind == "lstm":
        w3 = _load(weight + 3 * gate + square, corner)
    return w0, w1, w2, w3


@triton.jit
def _times(matrix, vector):
    """Sums of every fourth product, then of those: a single sum would wait for each of its additions."""
    products = matrix * vector[:, None]
    parts = tl.reshape(products, [matrix.shape[0] // 4, 4, matrix.shape[1]])
    return tl.sum(tl.sum(parts, axis=0), axis=0)


@triton.jit
def _read(kind: tl.constexpr, token, lanes, size, limit, tensors):
    """What a step needs besides the state; `limit` is the state's size, or 0 for a step that isn't there."""
    inputs, _, _, _, _, _ = tensors
    inside = lanes < limit
    gates: tl.constexpr = 1 if kind == "rnn_tanh" or kind == "rnn_relu" else (3 if kind == "gru" else 4)
    place = inputs + token * gates * size + lanes
    a = _load(place, inside)
    b = a
    c = a
    d = a
    if gates > 1:
        b = _load(place + size, inside)
        c = _load(place + 2 * size, inside)
    if gates > 3:
        d = _load(place + 3 * size, inside)
    return a, b, c, d


@triton.jit
def _step(kind: tl.constexpr, keep: tl.constexpr, h, m, read, token, lanes, size, saved, matrices, biases, tensors):
    """One step on; its results are stored if `saved` is the state's size, not if it is 0."""
    _, _, _, states, kept, _ = tensors
    a, b, c, d = read
    w0, w1, w2, w3 = matrices
    b0, b1, b2, b3 = biases
    save = lanes < saved
    a += b0 + _times(w0, h)
    if kind == "rnn_tanh":
        h = _tanh(a)
    elif kind == "rnn_relu":
        h = tl.where(a < 0.0, 0.0, a)  # keeps NaN
    else:
        a = tl.sigmoid(a)
        b = tl.sigmoid(b + b1 + _times(w1, h))
        if kind == "gru":  # gates reset and update, the new state and its recurrent part
            d = b2 + _times(w2, h)
            c = _tanh(c + a * d)
            h = c + b * (h - c)
        else:  # gates in, forget, new, out
            c = _tanh(c + b2 + _times(w2, h))
            d = tl.sigmoid(d + b3 + _times(w3, h))
            m = b * m + a * c
            h = d * _tanh(m)
        if keep:
            vectors: tl.constexpr = 4 if kind == "gru" else 5
            place = kept + token * vectors * size + lanes
            tl.store(place, a, mask=save)
            tl.store(place + size, b, mask=save)
            tl.store(place + 2 * size, c, mask=save)
            tl.store(place + 3 * size, d, mask=save)
            if kind == "lstm":
                tl.store(place + 4 * size, m, mask=save)
    tl.store(states + token * size + lanes, h, mask=save)
    return h, m


@triton.jit
def _read_back(kind: tl.constexpr, row, token, is_first, lanes, size, limit, tensors):
    """What a step back needs besides what it receives: its gradient, what was kept, and the state before it."""
    grads, hidden, memory, states, kept, _ = tensors
    inside = lanes < limit
    within = lanes < tl.where(is_first, 0, limit)
    first = tl.where(is_first, limit, 0)
    grad = _load(grads + token * size + lanes, inside)
    before = _load(states + (token - 1) * size + lanes, within) + _load_row(hidden, row, lanes, size, first)
    a = grad
    b = grad
    c = grad
    d = grad
    now = grad
    earlier = grad
    if kind == "gru" or kind == "lstm":
        vectors: tl.constexpr = 4 if kind == "gru" else 5
        place = kept + token * vectors * size + lanes
        a = _load(place, inside)
        b = _load(place + size, inside)
        c = _load(place + 2 * size, inside)
        d = _load(place + 3 * size, inside)
        if kind == "lstm":
            now = _load(place + 4 * size, inside)
            earlier = _load(place - size, within) + _load_row(memory, row, lanes, size, first)
    else:
        now = _load(states + token * size + lanes, inside)
    return grad, before, a, b, c, d, now, earlier


@triton.jit
def _step_back(kind: tl.constexpr, h, m, read, token, lanes, size, saved, matrices, tensors):
    """One step back: what the state before it receives, and what its gates do, before their nonlinearities."""
    _, _, _, _, _, record = tensors
    grad, before, a, b, c, d, now, earlier = read
    w0, w1, w2, w3 = matrices
    save = lanes < saved
    h += grad
    if kind == "rnn_tanh" or kind == "rnn_relu":
        da = tl.where(now > 0.0, h, 0.0) if kind == "rnn_relu" else h * (1.0 - now * now)
        db = da
        dc = da
        dd = da
        h = _times(w0, da)
        place = record + token * 2 * size + lanes
        tl.store(place + size, before, mask=save)
    elif kind == "gru":
        dc = h * (1.0 - b) * (1.0 - c * c)
        db = h * (before - c) * b * (1.0 - b)
        dd = dc * a
        da = dd * d * (1.0 - a)
        h = h * b + _times(w0, da) + _times(w1, db) + _times(w2, dd)
        place = record + token * 7 * size + lanes
        tl.store(place + size, db, mask=save)
        tl.store(place + 2 * size, dc, mask=save)
        tl.store(place + 3 * size, da, mask=save)
        tl.store(place + 4 * size, db, mask=save)
        tl.store(place + 5 * size, dd, mask=save)
        tl.store(place + 6 * size, before, mask=save)
    else:
        shown = _tanh(now)
        dd = h * shown * d * (1.0 - d)
        m += h * d * (1.0 - shown * shown)
        da = m * c * a * (1.0 - a)
        db = m * earlier * b * (1.0 - b)
        dc = m * a * (1.0 - c * c)
        m = m * b
        h = _times(w0, da) + _times(w1, db) + _times(w2, dc) + _times(w3, dd)
        place = record + token * 5 * size + lanes
        tl.store(place + size, db, mask=save)
        tl.store(place + 2 * size, dc, mask=save)
        tl.store(place + 3 * size, dd, mask=save)
        tl.store(place + 4 * size, before, mask=save)
    tl.store(place, da, mask=save)
    return h, m, da, db, dc, dd


@triton.jit
def _read_group(
    kind: tl.constexpr, backward: tl.constexpr, group: tl.constexpr, row, start, end, time, lanes, size, tensors
):
    """What each of a group of steps needs besides the state."""
    reads = ()
    for i in tl.static_range(group):
        limit = tl.where(start + i < end, size, 0)
        if backward:
            token = row * time + time - 1 - start - i
            reads += (_read_back(kind, row, token, start + i == time - 1, lanes, size, limit, tensors),)
        else:
            reads += (_read(kind, row * time + start + i, lanes, size, limit, tensors),)
    return reads


@triton.jit
def run_steps(
    kind: tl.constexpr, backward: tl.constexpr, keep: tl.constexpr, group: tl.constexpr, h, m, row, first, begin, end,
    time, lanes, size, matrices, biases, begun, tensors,
):  # fmt: skip
    """Steps from `first` to `end`, counted in the direction of the run; what those from `begin` on give is stored.

    What a `group` of steps needs is loaded one group ahead, since it takes as long to come as some steps do. The state
    before step `begin` is stored in `begun`.

    Returns:
        State and memory after the last step, the largest absolute value of states, and the sums over the stored steps
        of what their gates receive.
    """
    largest = tl.zeros_like(h)
    sum_a = tl.zeros_like(h)
    sum_b = tl.zeros_like(h)
    sum_c = tl.zeros_like(h)
    sum_d = tl.zeros_like(h)
    reads = _read_group(kind, backward, group, row, first, end, time, lanes, size, tensors)
    for start in tl.range(first, end, group):
        ahead = _read_group(kind, backward, group, row, start + group, end, time, lanes, size, tensors)
        saved = tl.where(start < begin, 0, size)
        if start == begin:
            tl.store(begun + lanes, h, mask=lanes < size)
            tl.store(begun + size + lanes, m, mask=lanes < size)
        for i in tl.static_range(group):
            limit = tl.where(start + i < end, size, 0)
            save = tl.minimum(saved, limit)
            if backward:
                token = row * time + time - 1 - start - i
                new_h, new_m, da, db, dc, dd = _step_back(
                    kind, h, m, reads[i], token, lanes, size, save, matrices, tensors
                )
                sum_a += tl.where(lanes < save, da, 0.0)
                sum_b += tl.where(lanes < save, db, 0.0)
                sum_c += tl.where(lanes < save, dc, 0.0)
                sum_d += tl.where(lanes < save, dd, 0.0)
            else:
                new_h, new_m = _step(
                    kind, keep, h, m, reads[i], row * time + start + i, lanes, size, save, matrices, biases, tensors
                )
            h = tl.where(lanes < limit, new_h, h)
            m = tl.where(lanes < limit, new_m, m)
            largest = tl.maximum(largest, tl.abs(h))
        reads = ahead
    return h, m, tl.max(largest, axis=0), (sum_a, sum_b, sum_c, sum_d)
