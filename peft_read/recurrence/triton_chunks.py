"""The recurrences in chunks of time as one Triton kernel: one program for each chunk of each sequence.

1. A program runs through some steps before its chunk, from zeros, and so comes upon a state to begin its chunk with.
   A recurrence that forgets has then forgotten the zeros.
2. It waits for what its predecessor has ended with. If its chunk began with something else, it runs that again, and
   waits whether its predecessor does so too, for a few rounds.
3. The last program of a sequence to come to its end looks at all chunks, from the first to the last, and mends those
   that still began with something else.

So the result is that of the sequential scan, up to a few roundings. The third part alone sees to that: the second is
why it rarely finds anything to mend. No program waits for another for more than a while, so none waits for ever; the
CPU never waits. A predecessor's ends are all kept and read one after another, so that the result doesn't depend on
which program is faster.
"""

import triton
import triton.language as tl

from .triton_steps import _load_matrices, _load_row, run_steps


PATIENCE = tl.constexpr(4096)  # how often a program looks for news of its predecessor, at intervals of a microsecond
BLOCK = tl.constexpr(64)  # of how many chunks it is found out at once whether they are to be compared


@triton.jit
def _fresh(pointer, inside):
    """What another program has stored, from beyond this processor's own cache."""
    return tl.load(pointer, mask=inside, other=0, cache_modifier=".cg")


@triton.jit
def _look(runs):
    """How often a program has run, doubled; and one, if that was the last time."""
    return tl.atomic_add(runs, 0, sem="acquire")


@triton.jit
def _differs(handed, begun, lanes, size, tolerance):
    """What a predecessor has handed over: state, memory, and the scale; and whether a chunk began with something else.

    Something else differs by more than a few roundings of the scale, which is the largest state that the predecessor
    knows of, or isn't finite.
    """
    inside = lanes < size
    h = _fresh(handed + lanes, inside)
    m = _fresh(handed + size + lanes, inside)
    scale = tl.load(handed + 2 * size, cache_modifier=".cg")
    had_h = _fresh(begun + lanes, inside)
    had_m = _fresh(begun + size + lanes, inside)
    allowed = tolerance * tl.maximum(tl.max(tl.maximum(tl.abs(h), tl.abs(m)), axis=0), scale)
    allowed = tl.where(allowed < 1e30, allowed, 0.0)
    equal = (tl.abs(h - had_h) <= allowed) & (tl.abs(m - had_m) <= allowed)
    return h, m, scale, tl.max(tl.where(equal, 0, 1), axis=0)


@triton.jit
def _hand_over(target, h, m, scale, lanes, size):
    tl.store(target + lanes, h, mask=lanes < size)
    tl.store(target + size + lanes, m, mask=lanes < size)
    tl.store(target + 2 * size, scale)


@triton.jit
def _run_chunk(
    kind: tl.constexpr, backward: tl.constexpr, keep: tl.constexpr, group: tl.constexpr, h, m, scale, row, place,
    first, begin, end, time, lanes, size, matrices, biases, tensors, begun, handed, ended, totals,
):  # fmt: skip
    """Run a chunk and store what it begins and ends with, the latter twice, and what its gates receive in all."""
    h, m, largest, sums = run_steps(
        kind, backward, keep, group, h, m, row, first, begin, end, time, lanes, size, matrices, biases,
        begun + place * 2 * size, tensors,
    )  # fmt: skip
    scale = tl.maximum(largest, scale)
    _hand_over(handed + place * (2 * size + 1), h, m, scale, lanes, size)
    _hand_over(ended + place * (2 * size + 1), h, m, scale, lanes, size)
    if backward:
        a, b, c, d = sums
        inside = lanes < size
        vectors: tl.constexpr = 6 if kind == "gru" else (4 if kind == "lstm" else 1)
        total = totals + place * vectors * size + lanes
        tl.store(total, a, mask=inside)
        if vectors > 1:
            tl.store(total + size, b, mask=inside)
            tl.store(total + 2 * size, c, mask=inside)
            tl.store(total + 3 * size, a if kind == "gru" else d, mask=inside)
        if vectors > 4:
            tl.store(total + 4 * size, b, mask=inside)
            tl.store(total + 5 * size, d, mask=inside)
    tl.debug_barrier()  # all threads have stored their part, before others are told and before any is read here


@triton.jit(
    do_not_specialize=[
        "given", "weight", "bias", "begin_h", "begin_m", "hidden", "memory", "states", "kept", "record", "scratch",
        "time", "size", "count", "length", "guess", "rounds", "tolerance",
    ]
)  # fmt: skip
def all_chunks(
    given, weight, bias, begin_h, begin_m, hidden, memory, states, kept, record, scratch,
    time, size, count, length, guess, rounds, tolerance,
    kind: tl.constexpr, backward: tl.constexpr, keep: tl.constexpr, padded: tl.constexpr, group: tl.constexpr,
):  # fmt: skip
    """Run a recurrence over `count` chunks of `length` steps of every sequence, as this module's docstring says.

    Args (for others see `kernel`):
        given: inputs or gradients.
        weight: the recurrent matrix, forward its transpose.
        bias: the recurrent bias, or None.
        begin_h, begin_m: what a run begins with, or None for zeros.
        scratch: memory for what programs tell each other, of zeros.
        guess: how many steps a program begins before its chunk; like `length` a multiple of `group`.
        rounds: how often a program may run its chunk again.
    """
    gates: tl.constexpr = 1 if kind == "rnn_tanh" or kind == "rnn_relu" else (3 if kind == "gru" else 4)
    programs = tl.num_programs(0).to(tl.int64)
    place = tl.program_id(0).to(tl.int64)
    row = place // count
    chunk = (place % count).to(tl.int32)
    lanes = tl.arange(0, padded)
    tensors = (given, hidden, memory, states, kept, record)

    # What lies in the scratch memory: how often each chunk has run, which of its predecessor's runs ended with what it
    # began with, how many programs of each sequence are done, what each chunk began with, what it ended with at last
    # and after each of its runs, what its gates received in all.
    width = 2 * size + 1
    runs = scratch.to(tl.pointer_type(tl.int32), bitcast=True)
    matches = runs + programs
    done = matches + programs
    begun = scratch + 2 * programs + programs // count
    ended = begun + programs * 2 * size
    handed = ended + programs * width
    totals = handed + programs * width * (rounds + 1)

    across = size if backward else gates * size
    matrices = _load_matrices(kind, weight, across, size * size if backward else size, lanes, size)
    b0 = _load_row(bias, 0, lanes, size, size)
    b1 = b0
    b2 = b0
    b3 = b0
    if gates > 1:
        b1 = _load_row(bias, 1, lanes, size, size)
        b2 = _load_row(bias, 2, lanes, size, size)
    if gates > 3:
        b3 = _load_row(bias, 3, lanes, size, size)
    biases = (b0, b1, b2, b3)

    # The chunk from a guess, then from what its predecessor ended with, if that is something else.
    begin = chunk * length
    first = tl.maximum(begin - guess, 0)
    from_start = first == 0
    h = _load_row(begin_h, row, lanes, size, tl.where(from_start, size, 0))
    m = _load_row(begin_m, row, lanes, size, tl.where(from_start, size, 0))
    scale = 0.0
    ran = 0
    match = 0
    again = 1
    while again == 1:
        _run_chunk(
            kind, backward, keep, group, h, m, scale, row, place, first, begin, tl.minimum(begin + length, time),
            time, lanes, size, matrices, biases, tensors, begun, handed + ran * programs * width, ended, totals,
        )  # fmt: skip
        ran += 1
        again = 0
        tl.atomic_xchg(runs + place, 2 * ran, sem="release")
        if not from_start:
            news = _look(runs + place - 1)
            looks = 0
            while (news // 2 <= match) & (news % 2 == 0) & (looks < PATIENCE):
                news = _look(runs + place - 1)
                looks += 1
            if news // 2 > match:
                before = handed + (match * programs + place - 1) * width
                next_h, next_m, scale, differs = _differs(before, begun + place * 2 * size, lanes, size, tolerance)
                match += 1
                if differs == 1:
                    if ran <= rounds:
                        h = next_h
                        m = next_m
                        first = begin
                        again = 1
                    else:
                        match = -1
    tl.store(matches + place, match)
    tl.debug_barrier()
    tl.atomic_or(runs + place, 1, sem="release")

    # The last program of a sequence mends what is left.
    if tl.atomic_add(done + row, 1, sem="acq_rel") == count - 1:
        differs = 0
        for base in tl.range(1, count, BLOCK):
            chunks = base + tl.arange(0, BLOCK)
            there = (chunks < count) & (chunks * length > guess)
            ran_before = _fresh(runs + row * count + chunks - 1, there) // 2
            stale = tl.where(_fresh(matches + row * count + chunks, there) != ran_before, 1, 0)
            if (tl.max(stale, axis=0) == 1) | (differs == 1):
                for i in tl.range(base, tl.minimum(base + BLOCK, count)):
                    place = row * count + i
                    before = ended + (place - 1) * width
                    h, m, scale, differs = _differs(before, begun + place * 2 * size, lanes, size, tolerance)
                    if differs == 1:
                        _run_chunk(
                            kind, backward, keep, group, h, m, scale, row, place, i * length, i * length,
                            tl.minimum(i * length + length, time), time, lanes, size, matrices, biases, tensors,
                            begun, handed, ended, totals,
                        )  # fmt: skip
