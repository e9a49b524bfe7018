"""Say how many blocks a node can host, where the model's first and last block come with weights of their own.  Pure.

The node of the first block holds the embedding, the node of the last block the LM head.  Of a wide model these are as
large as several blocks, so a node may hold fewer blocks at an end of the model than in its middle.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from treeswarm.protocol.spans import Span


@dataclass(frozen=True)
class SpanLimits:
    """Holds the most blocks of a span, by the ends of the model that it includes; 0 if no such span fits."""

    middle: int
    """Largest number of blocks of a span with neither end."""
    head: int
    """Largest number of blocks of a span that begins with block 0 and does not end with the last one."""
    tail: int
    """Largest number of blocks of a span that ends with the last block and does not begin with block 0."""
    whole: bool
    """Whether the whole model fits."""

    @classmethod
    def same(cls, length: int, blocks: int) -> "SpanLimits":
        """Return limits that are the same wherever a span is."""
        return cls(length, length, length, length >= blocks)

    @property
    def longest(self) -> int:
        """Largest number of blocks of any span that is not the whole model."""
        return max(self.middle, self.head, self.tail)

    @property
    def is_same(self) -> bool:
        """Whether the ends of the model make no difference."""
        return self.middle == self.head == self.tail

    def allow(self, span: Span, blocks: int) -> bool:
        """Return whether a span of a model of `blocks` blocks fits."""
        if len(span) == blocks:
            return self.whole
        return len(span) <= (self.head if span.start == 0 else self.tail if span.end == blocks else self.middle)

    def longest_spans(self, within: Span, blocks: int) -> Iterator[Span]:
        """Yield the longest spans that fit within `within`: at each end of the model, and everywhere between."""
        if self.whole and len(within) == blocks:
            yield within
            return
        if within.start == 0 and (head := min(self.head, within.end, blocks - 1)):
            yield Span(0, head)
        if within.end == blocks and (tail := min(self.tail, len(within), blocks - 1)):
            yield Span(blocks - tail, blocks)
        first, last = max(within.start, 1), min(within.end, blocks - 1)
        if middle := min(self.middle, last - first):
            yield from (Span(start, start + middle) for start in range(first, last - middle + 1))

    def at_most(self, length: int) -> "SpanLimits":
        """Return these limits, none of them above `length`."""
        return SpanLimits(min(self.middle, length), min(self.head, length), min(self.tail, length), self.whole)
