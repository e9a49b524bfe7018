"""How long to wait for an answer, estimated from how long answers took before.  Pure."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RoundTrip:
    """Smoothed time and mean deviation in seconds, after RFC 6298, by which TCP waits."""

    smoothed: float = 0.0
    deviation: float = 0.0
    samples: int = 0
    """Number of measurements."""

    def with_sample(self, seconds: float) -> "RoundTrip":
        """Return the estimate after one more measurement."""
        if not self.samples:
            return RoundTrip(seconds, seconds / 2, 1)
        deviation = 0.75 * self.deviation + 0.25 * abs(self.smoothed - seconds)
        smoothed = 0.875 * self.smoothed + 0.125 * seconds
        return replace(self, smoothed=smoothed, deviation=deviation, samples=self.samples + 1)

    def deadline(self, least: float) -> float:
        """Return the seconds after which an answer is overdue: four deviations past the usual, at least `least`."""
        return max(least, self.smoothed + 4 * self.deviation)
