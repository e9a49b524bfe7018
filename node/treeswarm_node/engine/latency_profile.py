"""Measure how long this node's forwards take, by number of rows.  Clients plan their trees by this profile."""

import time

import numpy as np

from treeswarm.protocol.messages import Answers, Append, Profile
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.engine.model_runner import Runner
from treeswarm_node.kv_cache.kv_store import KVStore
from treeswarm_node.kv_cache.page_pool import PAGE
from treeswarm_node.model.loaded_span import ServedSpan

# Numbers of rows to measure: one token, and trees from small to the largest that clients choose by themselves.  On a
# CPU the second row costs more than any other of the first sixteen: a product with a vector becomes one with a matrix.
# Three small blocks took 7.5, 7.8, 9.2, 9.7 and 8.9 ms for 1, 2, 4, 8 and 16 rows.  A table that went straight
# from 1 to 16 rows would show the second row as free.
SIZES = (1, 2, 4, 16, 64, 256)
RUNS = 4
# Seconds that repeated forwards may take.  A size that would exceed this is measured once, and one that would exceed
# the second bound is not measured: clients extrapolate from the others.  At a load of 10 a third of SmolLM2-135M had
# time for one row, and clients believed that trees of 200 rows cost no more: 0.85 of plain decoding.
BUDGET_S, LONGEST_S = 1.0, 4.0


def measure_profile(runner: Runner, served: ServedSpan, store: KVStore) -> Profile:
    """Return pairs (rows, microseconds) for `SIZES`: the fastest of `RUNS` forwards, after one to warm up.

    Where that would take too long it is a single forward.

    The fastest forward is taken because other load on this machine only makes forwards slower, one size at a time.
    Clients correct a table that is too low throughout sooner than one with a bump.

    The forwards include embedding, LM head and sampling where this node has them.  Sizes for which there is no time
    or no room in the KV cache are left out; for the first size there is always time.
    """
    points: list[tuple[int, int]] = []
    start, last_s = time.perf_counter(), 0.0
    for rows in SIZES:
        # The time of a forward grows at most in proportion to its rows.
        once_s = last_s * rows / points[-1][0] if points else 0.0
        elapsed_s = time.perf_counter() - start
        if elapsed_s + once_s > LONGEST_S or store.free_tokens < rows + 2 * PAGE:
            break
        forwards = RUNS + 1 if elapsed_s + (RUNS + 1) * once_s <= BUDGET_S else 1
        times = [_time_forward(runner, served, store, rows) for _ in range(forwards)]
        last_s = min(times[1:] or times)
        points.append((rows, max(1, int(1e6 * last_s))))
    return tuple(points)


def scale_profile(profile: Profile, part: Span, whole: Span) -> Profile:
    """Return the profile of a session that computes only the blocks `part`: times shrink with the number of blocks."""
    share = len(part) / len(whole)
    return tuple((rows, max(1, int(micros * share))) for rows, micros in profile)


def _time_forward(runner: Runner, served: ServedSpan, store: KVStore, rows: int) -> float:
    """Return the seconds of a forward of a tree with `rows` rows below a text of one token."""
    row_bytes = served.activation_bytes if served.span.start else 0
    session = NodeSession(SessionTerms(0, 1, rows, rows + 1, served.vocab_size, row_bytes))
    kv = store.open(1, rows)
    try:
        elapsed_s = 0.0
        for append in (_make_append(0, 1, row_bytes, prefill=True), _make_append(1, rows, row_bytes, prefill=False)):
            (step,) = session.receive(append)
            start = time.perf_counter()
            runner.run([Segment(kv, step, served.span)])
            elapsed_s = time.perf_counter() - start
            session.finish(step)
        return elapsed_s
    finally:
        kv.close()


def _make_append(seq: int, rows: int, row_bytes: int, *, prefill: bool) -> Append:
    first = 1 + seq
    return Append(
        epoch=0,
        seq=seq,
        commit=np.empty(0, np.uint32),
        first_id=first,
        parents=np.arange(first - 1, first - 1 + rows, dtype=np.uint32),
        tokens=np.zeros(rows, np.uint32),
        prefill=prefill,
        answers=Answers.NONE if prefill else Answers.ALL,
        settings=SamplingSettings(),
        skipped=np.zeros(rows, np.bool_),
        hidden=bytes(rows * row_bytes),
    )
