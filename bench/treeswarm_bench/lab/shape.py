"""What a link does to packets: pure and seeded; the clock is the caller's."""

import random
import re
from dataclasses import dataclass, field

from treeswarm.errors import BadRequest

SCALES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "%": 1e-2}
PARTS = re.compile(r"(?:(delay|jitter)=([\d.]+)(us|ms|s)|(rate)=([\d.]+)([kmg]bit)|(loss)=([\d.]+)(%))")
EXAMPLE = "delay=25ms,jitter=2ms,rate=100mbit,loss=0.1%"
# What waits in front of a slow line before more is dropped: home routers buffer 0.1 to 1 s.
QUEUE_S = 0.2


@dataclass(frozen=True)
class LabLink:
    """One direction between two hosts: `delay_s` ± `jitter_s` one way, `rate_bps` bits a second (None: no limit), and
    the share of packets that is lost."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    rate_bps: float | None = None
    loss: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "LabLink":
        """Read `delay=25ms,jitter=2ms,rate=100mbit,loss=0.1%`; each part may be left out.  Raises BadRequest."""
        found: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            match = PARTS.fullmatch(part)
            name, number, unit = filter(None, match.groups()) if match else ("", "", "")
            try:
                found[name] = float(number) * SCALES[unit]
            except (ValueError, KeyError):
                raise BadRequest(f"'{text}' is no link: give {EXAMPLE} or some of it") from None
        if found.get("rate") == 0.0 or found.get("loss", 0.0) >= 1.0:
            raise BadRequest(f"'{text}' is a link that carries nothing: give a rate above 0 and a loss below 100%")
        return cls(found.get("delay", 0.0), found.get("jitter", 0.0), found.get("rate"), found.get("loss", 0.0))

    def __str__(self) -> str:
        """As `parse` reads it."""
        parts = [f"delay={1e3 * self.delay_s:.10g}ms"]
        parts += [f"jitter={1e3 * self.jitter_s:.10g}ms"] if self.jitter_s else []
        parts += [f"rate={self.rate_bps / 1e6:.10g}mbit"] if self.rate_bps else []
        parts += [f"loss={100 * self.loss:.10g}%"] if self.loss else []
        return ",".join(parts)


@dataclass(eq=False)
class LinkModel:
    """The state of one direction.  `link` may be replaced at any time; packets under way keep their arrival."""

    link: LabLink
    seed: str = ""
    packets: int = 0
    """Carried."""
    bytes: int = 0
    """Carried."""
    lost: int = 0
    dropped: int = 0
    """Found the queue full."""
    _free_at: float = 0.0
    _last: float = 0.0
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def arrival(self, size: int, now: float) -> float | None:
        """When a packet of `size` bytes sent at `now` is there; None if it never will be.

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
