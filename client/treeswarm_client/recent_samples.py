"""The location of a few recent samples of which some are far off.  Pure.

A machine that is not idle makes single samples ten or fifty times as long as usual, and most often the first one, which
also reads code and weights for the first time.  A median ignores them as long as they are the minority, and follows a
lasting change once the changed samples are the majority.
"""

from dataclasses import dataclass

# Number of samples kept: a lasting change is the majority after five rounds with a sample each.
KEPT = 8


@dataclass(frozen=True)
class RecentSamples:
    """The newest samples of one quantity."""

    values: tuple[float, ...] = ()
    """Samples, oldest first."""

    def __len__(self) -> int:
        """Return the number of samples kept."""
        return len(self.values)

    def updated(self, value: float) -> "RecentSamples":
        """Return the samples with one more."""
        return RecentSamples((*self.values, value)[-KEPT:])

    def location(self, prior: float) -> float:
        """Return the lower median of the samples and of `prior`, which counts as one of them.

        So a first sample above the prior is not evidence by itself, and a second one that agrees with it is.
        """
        ordered = sorted((*self.values, prior))
        return ordered[(len(ordered) - 1) // 2]
