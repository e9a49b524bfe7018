"""How long to wait, from how long it took before.  Pure."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RoundTrip:
    """Smoothed time and its mean deviation, after RFC 6298 (which TCP waits by).  Seconds."""

    smoothed: float = 0.0
    deviation: float = 0.0
    samples: int = 0

    def with_sample(self, seconds: float) -> "RoundTrip":
        """With one more measurement."""
        if not self.samples:
            return RoundTrip(seconds, seconds / 2, 1)
        deviation = 0.75 * self.deviation + 0.25 * abs(self.smoothed - seconds)
        smoothed = 0.875 * self.smoothed + 0.125 * seconds
        return replace(self, smoothed=smoothed, deviation=deviation, samples=self.samples + 1)

    def deadline(self, least: float) -> float:
        """When an answer is overdue: four deviations past what is usual, never under `least`."""
        return max(least, self.smoothed + 4 * self.deviation)
