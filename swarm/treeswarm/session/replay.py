"""Replays: the rows of a trunk as appends for a node that replaces a lost one.  Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from treeswarm.protocol.messages import SEGMENT_BYTES, Answers, Append
from treeswarm.protocol.sampling import SamplingSettings

# A forward of this many prefill rows is as efficient as a larger one; that would only delay the next node's start.
REPLAY_ROWS = 512


@dataclass(frozen=True, eq=False)
class JoinedBytes:
    """Pieces of bytes that are read as if they were one, without copying them together."""

    pieces: Sequence[bytes | bytearray]

    def __getitem__(self, part: slice) -> bytes:
        """Return the bytes from `part.start` up to `part.stop`; both must be given."""
        cuts, start = [], 0
        for piece in self.pieces:
            cuts.append(piece[max(0, part.start - start) : max(0, part.stop - start)])
            start += len(piece)
        return b"".join(cuts)


def replay(
    epoch: int, tokens: Sequence[int], hidden: bytes | bytearray | JoinedBytes = b"", row_bytes: int = 0
) -> Iterator[Append]:
    """Yield the whole trunk, with these tokens, as appends for a node that has none of it.

    `hidden` holds the activations that the upstream node once sent, row-major with `row_bytes` per row; it is empty on
    the way to the head.
    """
    rows = max(1, min(REPLAY_ROWS, SEGMENT_BYTES // max(1, row_bytes)))
    for seq, start in enumerate(range(0, len(tokens), rows)):
        count = len(tokens[start : start + rows])
        yield Append(
            epoch=epoch,
            seq=seq,
            commit=np.empty(0, np.uint32),
            first_id=start + 1,
            parents=np.arange(start, start + count, dtype=np.uint32),
            tokens=np.array(tokens[start : start + count], np.uint32),
            prefill=True,
            answers=Answers.NONE,
            settings=SamplingSettings(),
            skipped=np.zeros(count, np.bool_),
            hidden=bytes(hidden[start * row_bytes : (start + count) * row_bytes]),
            replay=True,
        )
