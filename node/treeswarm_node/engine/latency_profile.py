"""How long this node's forwards take, by rows: what clients plan their trees by."""

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

# One token, and trees from small to the largest that clients choose by themselves.  On a CPU the second row is the
# dearest of the first sixteen, where a product with a vector becomes one with a matrix (of 1, 2, 4, 8, 16 rows: 7.5,
# 7.8, 9.2, 9.7, 8.9 ms of three small blocks); who goes straight from 1 to 16 takes it for free.
SIZES = (1, 2, 4, 16, 64, 256)
RUNS = 4
# Loading takes longer by far.  A size that would overstep it is not measured, and clients go on from the others.
BUDGET_S = 1.0


def measure_profile(device: Runner, served: ServedSpan, store: KVStore) -> Profile:
    """The least microseconds of some forwards for each of `SIZES`, after one to warm up: whatever else runs on this
    machine only makes them longer, one size at a time, and clients mend a table that is too low throughout sooner than
    one with a bump.

    Whole forwards, with embedding, LM head and choice where this node has them.  Sizes for which there is
    no time or no room among the KV rows are left out; the first one has time always.
    """
    points: list[tuple[int, int]] = []
    start, last_s = time.perf_counter(), 0.0
    for rows in SIZES:
        # A forward is at most as much dearer than the last size's as it has more rows.
        dearest_s = last_s * rows / points[-1][0] * (RUNS + 1) if points else 0.0
        spent_s = time.perf_counter() - start
        if spent_s + dearest_s > BUDGET_S or store.free_tokens < rows + 2 * PAGE:
            break
        took = [_forward_s(device, served, store, rows) for _ in range(RUNS + 1)]
        last_s = min(took[1:])
        points.append((rows, max(1, int(1e6 * last_s))))
    return tuple(points)


def scale_profile(profile: Profile, part: Span, whole: Span) -> Profile:
    """For a session that computes a part of the blocks: as many times less as it has fewer."""
    share = len(part) / len(whole)
    return tuple((rows, max(1, int(micros * share))) for rows, micros in profile)


def _forward_s(device: Runner, served: ServedSpan, store: KVStore, rows: int) -> float:
    """A tree of so many rows below a text of one token."""
    row_bytes = served.activation_bytes if served.span.start else 0
    session = NodeSession(SessionTerms(0, 1, rows, rows + 1, served.vocab_size, row_bytes))
    kv = store.open(1, rows)
    try:
        took = 0.0
        for append in (_append(0, 1, row_bytes, prefill=True), _append(1, rows, row_bytes, prefill=False)):
            (step,) = session.receive(append)
            start = time.perf_counter()
            device.run([Segment(kv, step, served.span)])
            took = time.perf_counter() - start
            session.finish(step)
        return took
    finally:
        kv.close()


def _append(seq: int, rows: int, row_bytes: int, *, prefill: bool) -> Append:
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
