"""Spans of decoder blocks, and whether a set of spans covers a whole model."""

from collections.abc import Sequence
from dataclasses import dataclass

from treeswarm.errors import BadRequest


@dataclass(frozen=True, order=True)
class Span:
    """Decoder blocks `start` up to, not including, `end`.  Raises BadRequest unless 0 <= start < end."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise BadRequest(f"blocks {self.start}:{self.end} are not a span: give START:END with 0 <= START < END")

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def __contains__(self, other: "Span") -> bool:
        return self.start <= other.start and other.end <= self.end

    def overlaps(self, other: "Span") -> bool:
        """Return whether the two have a block in common."""
        return self.start < other.end and other.start < self.end

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Read `"4:8"`.  Raises BadRequest for anything else."""
        start, colon, end = text.partition(":")
        if not (colon and start.isdecimal() and end.isdecimal()):
            raise BadRequest(f"'{text}' is not a span of blocks: give START:END, such as 0:4")
        return cls(int(start), int(end))


def missing_blocks(spans: Sequence[Span], blocks: int) -> list[Span]:
    """Return the gaps that `spans` leave in a model with `blocks` blocks, in order."""
    gaps, reached = [], 0
    for span in sorted(spans):
        if span.start > reached:
            gaps.append(Span(reached, min(span.start, blocks)))
        reached = max(reached, span.end)
        if reached >= blocks:
            return gaps
    return [*gaps, Span(reached, blocks)]
