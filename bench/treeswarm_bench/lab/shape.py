"""Delays and drops the packets of a link.  Pure and seeded; the clock is the caller's."""

import random
import re
from dataclasses import dataclass, field

from treeswarm.errors import BadRequest

SCALES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "%": 1e-2}
PARTS = re.compile(r"(?:(delay|jitter)=([\d.]+)(us|ms|s)|(rate)=([\d.]+)([kmg]bit)|(loss)=([\d.]+)(%))")
EXAMPLE = "delay=25ms,jitter=2ms,rate=100mbit,loss=0.1%"
# Seconds of traffic queued in front of a slow link before packets are dropped: home routers buffer 0.1 to 1 s.
QUEUE_S = 0.2


@dataclass(frozen=True)
class LabLink:
    """The shape of one direction of the link between two hosts."""

    delay_s: float = 0.0
    """Seconds from one host to the other, without the jitter."""
    jitter_s: float = 0.0
    """Seconds by which the delay of a packet is longer or shorter, at most."""
    rate_bps: float | None = None
    """Bits per second, or None for no limit."""
    loss: float = 0.0
    """Share of packets that are lost."""

    @classmethod
    def parse(cls, text: str) -> "LabLink":
        """Read `delay=25ms,jitter=2ms,rate=100mbit,loss=0.1%`; each part may be left out.  Raises BadRequest."""
        values: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            match = PARTS.fullmatch(part)
            name, number, unit = filter(None, match.groups()) if match else ("", "", "")
            try:
                values[name] = float(number) * SCALES[unit]
            except (ValueError, KeyError):
                raise BadRequest(f"'{text}' is not a link: give {EXAMPLE} or parts of it") from None
        if values.get("rate") == 0.0 or values.get("loss", 0.0) >= 1.0:
            raise BadRequest(f"'{text}' is a link that carries nothing: give a rate above 0 and a loss below 100%")
        return cls(values.get("delay", 0.0), values.get("jitter", 0.0), values.get("rate"), values.get("loss", 0.0))

    def __str__(self) -> str:
        """Return the text that `parse` reads as this link."""
        parts = [f"delay={1e3 * self.delay_s:.10g}ms"]
        parts += [f"jitter={1e3 * self.jitter_s:.10g}ms"] if self.jitter_s else []
        parts += [f"rate={self.rate_bps / 1e6:.10g}mbit"] if self.rate_bps else []
        parts += [f"loss={100 * self.loss:.10g}%"] if self.loss else []
        return ",".join(parts)


@dataclass(eq=False)
class LinkModel:
    """The state of one direction of a link.

    `link` may be replaced at any time; packets in transit keep their time of arrival.
    """

    link: LabLink
    seed: str = ""
    packets: int = 0
    """Number of packets carried."""
    bytes: int = 0
    """Number of bytes carried."""
    lost: int = 0
    """Number of packets lost at random."""
    dropped: int = 0
    """Number of packets dropped because the queue was full."""
    _free_at: float = 0.0
    _last: float = 0.0
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def arrival(self, size: int, now: float) -> float | None:
        """Return when a packet of `size` bytes sent at `now` arrives, or None if it never does.

        Packets keep their order, whatever the jitter: real paths seldom reorder, and TCP takes reordering for loss.
        """
        if self._free_at - now > QUEUE_S:
            self.dropped += 1
            return None
        if self.link.rate_bps:
            self._free_at = max(self._free_at, now) + size * 8 / self.link.rate_bps
        if self.link.loss and self._random.random() < self.link.loss:
            self.lost += 1
            return None
        jitter = self.link.jitter_s * self._random.uniform(-1.0, 1.0) if self.link.jitter_s else 0.0
        self._last = max(self._last, max(now, self._free_at) + max(0.0, self.link.delay_s + jitter))
        self.packets += 1
        self.bytes += size
        return self._last
