"""How long to wait for an answer, estimated from how long answers took before.  Pure."""

from dataclasses import dataclass, field, replace

PING_EVERY_S = 0.5
# A living node's event loop was seen to stall for a second and more on a machine with ten busy processes on two cores;
# to take a slow node for a dead one costs a replay, so the measured deadline is never trusted below this.
LEAST_SILENCE_S = 2.0
# RFC 6298 forgets within four samples, which are two seconds of pings here; a machine is busy for longer.  The latest
# answer of this time counts, twice: TCP backs off by the same factor.
REMEMBERED_S = 60.0
BACK_OFF = 2.0


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


@dataclass(eq=False)
class Heartbeat:
    """When one node was last heard, and by when it must be heard again.  Times are seconds of the loop's clock."""

    round_trip: RoundTrip = RoundTrip()
    heard_at: float = 0.0
    excused_s: float = 0.0
    """Seconds of the present silence in which this program itself was late, so that messages may lie unread."""
    _late: list[tuple[float, float]] = field(default_factory=list)
    """Times and lengths of remembered silences and round trips; each is longer than those after it."""

    def begin(self, now: float) -> None:
        """Note that a stream to the node was opened."""
        self.heard_at, self.excused_s = now, 0.0

    def hear(self, now: float) -> None:
        """Note a message of the node."""
        self._remember(self.silence_s(now), now)
        self.begin(now)

    def add_round_trip(self, seconds: float, now: float) -> None:
        """Note a pong that came `seconds` after its ping."""
        self.round_trip = self.round_trip.with_sample(seconds)
        self._remember(seconds, now)

    def excuse(self, late_s: float) -> None:
        """Note that this program's own event loop was late by `late_s` seconds: that silence is not the node's."""
        self.excused_s += max(0.0, late_s)

    def silence_s(self, now: float) -> float:
        """Return for how long the node was silent while this program listened."""
        return max(0.0, now - self.heard_at - self.excused_s)

    def patience_s(self, least: float, now: float) -> float:
        """Return the seconds within which an answer is due, at least `least`."""
        latest = next((late for at, late in self._late if now - at < REMEMBERED_S), 0.0)
        return max(self.round_trip.deadline(least), BACK_OFF * latest)

    def is_overdue(self, now: float) -> bool:
        """Return whether the node has been silent for too long."""
        return self.silence_s(now) > PING_EVERY_S + self.patience_s(LEAST_SILENCE_S, now)

    def _remember(self, seconds: float, now: float) -> None:
        self._late = [(at, late) for at, late in self._late if late > seconds and now - at < REMEMBERED_S]
        self._late.append((now, seconds))
