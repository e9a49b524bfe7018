"""Rows of the trunk on their way to a node that replaces a lost one.  Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from treeswarm.protocol.messages import SEGMENT_BYTES, Answers, Append
from treeswarm.protocol.sampling import SamplingSettings

# A forward of this many prefill rows is as efficient as any; more would only delay the next node's start.
REPLAY_ROWS = 512


@dataclass(frozen=True, eq=False)
class Joined:
    """Pieces read as one run of bytes, and never copied into one."""

    pieces: Sequence[bytes | bytearray]

    def __getitem__(self, part: slice) -> bytes:
        """Of a slice from one place to another."""
        found, start = [], 0
        for piece in self.pieces:
            found.append(piece[max(0, part.start - start) : max(0, part.stop - start)])
            start += len(piece)
        return b"".join(found)


def replay(
    epoch: int, tokens: Sequence[int], hidden: bytes | bytearray | Joined = b"", row_bytes: int = 0
) -> Iterator[Append]:
    """The whole trunk as appends for a node that has none of it.

    `hidden` is row-major, `row_bytes` a row: what the node's upstream neighbour once sent; empty towards the head.
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
