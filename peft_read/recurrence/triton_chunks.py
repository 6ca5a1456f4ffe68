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
def _next_stale(i, count, row, length, guess, runs, matches):
    """The first chunk from `i` on of which it isn't known that it began with what its predecessor ended with."""
    found = 0
    while (found == 0) & (i < count):
        chunks = i + tl.arange(0, BLOCK)
        there = (chunks < count) & (chunks * length > guess)
        ran_before = _fresh(runs + row * count + chunks - 1, there) // 2
        stale = _fresh(matches + row * count + chunks, there) != ran_before
        ahead = tl.min(tl.where(stale, tl.arange(0, BLOCK), BLOCK), axis=0)
        i += ahead
        found = tl.where(ahead < BLOCK, 1, 0)
    return i


@triton.jit
def _store_all(kind: tl.constexpr, backward: tl.constexpr, sums, h, m, end_h, end_m, totals, place, row, ends, lanes,
               size, programs):  # fmt: skip
    """What only the host asks for: what a sequence ends with, and what a chunk's gates receive in all."""
    inside = lanes < size
    at_end = lanes < tl.where(ends, size, 0)
    if end_h is not None:
        tl.store(end_h + row * size + lanes, h, mask=at_end)
    if end_m is not None:
        tl.store(end_m + row * size + lanes, m, mask=at_end)
    if backward:
        a, b, c, d = sums
        # The chunks lie next to each other: sums over them are then sums over rows.
        total = totals + lanes * programs + place
        across = size * programs
        tl.store(total, a, mask=inside)
        if kind == "gru" or kind == "lstm":
            tl.store(total + across, b, mask=inside)
            tl.store(total + 2 * across, c, mask=inside)
            tl.store(total + 3 * across, a if kind == "gru" else d, mask=inside)
        if kind == "gru":
            tl.store(total + 4 * across, b, mask=inside)
            tl.store(total + 5 * across, d, mask=inside)


@triton.jit(
    do_not_specialize=[
        "given", "weight", "bias", "begin_h", "begin_m", "hidden", "memory", "states", "kept", "record", "end_h",
        "end_m", "scratch", "time", "size", "count", "length", "guess", "rounds", "tolerance",
    ]
)  # fmt: skip
def all_chunks(
    given, weight, bias, begin_h, begin_m, hidden, memory, states, kept, record, end_h, end_m, scratch,
    time, size, count, length, guess, rounds, tolerance,
    kind: tl.constexpr, backward: tl.constexpr, keep: tl.constexpr, padded: tl.constexpr, group: tl.constexpr,
):  # fmt: skip
    """Run a recurrence over `count` chunks of `length` steps of every sequence, as this module's docstring says.

    There is one loop, and one place in it where a chunk is run, since that takes long to compile.

    Args (for others see `triton_steps`):
        given: inputs or gradients.
        weight: the recurrent matrix, forward its transpose.
        bias: the recurrent bias, or None.
        begin_h, begin_m: what a run begins with, or None for zeros.
        end_h, end_m: where to store what the sequences end with, or None.
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
    # began with, how many programs of each sequence are done, what each chunk began with, what it ended with after
    # each of its runs, what its gates received in all.
    width = 2 * size + 1
    runs = scratch.to(tl.pointer_type(tl.int32), bitcast=True)
    matches = runs + programs
    done = matches + programs
    begun = scratch + 2 * programs + programs // count
    handed = begun + programs * 2 * size
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
    first = tl.maximum(chunk * length - guess, 0)
    from_start = first == 0
    h = _load_row(begin_h, row, lanes, size, tl.where(from_start, size, 0))
    m = _load_row(begin_m, row, lanes, size, tl.where(from_start, size, 0))
    scale = 0.0
    ran = 0
    match = 0
    mending = 0
    again = 1
    while again == 1:
        begin = chunk * length
        h, m, largest, sums = run_steps(
            kind, backward, keep, group, h, m, row, first, begin, tl.minimum(begin + length, time), time, lanes, size,
            matrices, biases, begun + place * 2 * size, tensors,
        )  # fmt: skip
        _store_all(
            kind, backward, sums, h, m, end_h, end_m, totals, place, row, chunk == count - 1, lanes, size, programs
        )
        handover = handed + (ran * programs + place) * width
        tl.store(handover + lanes, h, mask=lanes < size)
        tl.store(handover + size + lanes, m, mask=lanes < size)
        tl.store(handover + 2 * size, tl.maximum(largest, scale))
        tl.debug_barrier()  # all threads have stored their part, before others are told and before any is read here
        if mending == 0:
            tl.atomic_xchg(runs + place, 2 * (ran + 1), sem="release")

        # Is there a chunk to run: this program's own again, or, for the last program of a sequence, one to be mended?
        again = 0
        changed = mending
        looking = 1
        while looking == 1:
            looking = 0
            before = handed
            compares = 0
            if mending == 1:
                chunk += 1
                if changed == 0:
                    chunk = _next_stale(chunk, count, row, length, guess, runs, matches)
                if chunk < count:
                    place = row * count + chunk
                    ran_before = tl.load(runs + place - 1, cache_modifier=".cg") // 2
                    before = handed + ((ran_before - 1) * programs + place - 1) * width
                    compares = 1
            elif not from_start:
                news = _look(runs + place - 1)
                looks = 0
                while (news // 2 <= match) & (news % 2 == 0) & (looks < PATIENCE):
                    news = _look(runs + place - 1)
                    looks += 1
                if news // 2 > match:
                    before = handed + (match * programs + place - 1) * width
                    match += 1
                    compares = 1
            if compares == 1:
                had = begun + place * 2 * size
                next_h, next_m, next_scale, differs = _differs(before, had, lanes, size, tolerance)
                if (differs == 1) & (mending == 0) & (ran >= rounds):
                    match = -1  # it is left to be mended
                elif differs == 1:
                    h = next_h
                    m = next_m
                    scale = next_scale
                    again = 1
            if again == 1:
                first = chunk * length
                ran += 1
                if mending == 1:
                    ran = tl.load(runs + place, cache_modifier=".cg") // 2 - 1
            elif mending == 1:
                changed = 0
                looking = compares
            else:
                tl.store(matches + place, match)
                tl.debug_barrier()
                tl.atomic_or(runs + place, 1, sem="release")
                if tl.atomic_add(done + row, 1, sem="acq_rel") == count - 1:
                    mending = 1
                    looking = 1
                    chunk = 0
