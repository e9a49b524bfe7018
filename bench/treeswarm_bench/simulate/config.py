"""What is simulated.  Times are virtual seconds."""

from dataclasses import dataclass

from treeswarm.errors import BadRequest

# Registry: a record is at most 600 bytes, announced again every minute; two and a half periods without it, and the
# node counts as gone.  It takes up to some seconds to be stored and found; readers look every ten.
RECORD_BYTES = 600
ANNOUNCE_S, EXPIRY_S, POLL_S = 60.0, 150.0, 10.0
PROPAGATION_S = (0.5, 5.0)

# A node that announced something looks again after this: propagation and a poll, and some.  In a crowd it makes room
# at most so often before it loads.
SETTLE_S, SETTLE_TIMES = 20.0, 3
# Weights of some GB from disk or from a mirror.
LOAD_S = (30.0, 90.0)
# Nodes that leave or move let their sessions end or go elsewhere for so long.
DRAIN_S = 30.0
# A node asks itself about every ten minutes whether it should move; within half a minute where a block is missing.
CHECK_S = (450.0, 750.0)
ALARM_S = (5.0, 30.0)
# Volunteers close a laptop as often as they stop the program.
GRACEFUL = 0.5

# One traversal carries a tree of 64 rows.  A consumer GPU of 1 TB/s runs a block of a 70B model in 8 bits (0.85 GB)
# about a thousand times a second, whatever the tree: 64,000 block-rows a second; the median volunteer has half of it.
ROWS = 64
MEDIAN_RATE, RATE_SIGMA = 30_000.0, 0.8
# Memory for some ten blocks of 0.85 GB in the median.  Log-normal both: many small, few large, as in every list of
# volunteers' hardware (BOINC's, Folding@home's).
MEDIAN_LENGTH, LENGTH_SIGMA = 10.0, 0.6
# Room for 16 sessions in the median.
MEDIAN_CACHE, CACHE_SIGMA, ROOM = 65_536, 0.5, 4096
# A node's own time a visit, and the share of its time that one session's rows want of it.
OVERHEAD_S, DUTY = 0.004, 0.2

# A client reads for half a minute, then asks for text that takes two minutes.
THINK_S, SESSION_S = 30.0, 120.0
ATTEMPTS = 6
# A dead address is given up after this; a refusal takes one round trip.
CONNECT_S, REFUSED_S = 2.0, 0.1
# A client notices a node's death in mid-session.
NOTICE_S = 3.0

# Round trips that a newcomer measures, and how exactly.
SAMPLES, RTT_NOISE = 32, 0.1
# Regions on a plane of round-trip seconds: America's east and west, Europe, India, East Asia, South America; the share
# of hosts in each, and how far they spread.
REGIONS = ((0.0, 0.0), (0.06, 0.01), (-0.08, 0.02), (-0.13, 0.13), (0.1, 0.15), (-0.02, -0.12))
REGION_SHARES = (0.25, 0.15, 0.3, 0.05, 0.2, 0.05)
REGION_SPREAD_S, ACCESS_S = 0.008, 0.006

SAMPLE_S = 30.0


@dataclass(frozen=True)
class Settings:
    """`churn`: share of nodes replaced an hour; `flash_crowd`: nodes that join within one minute after a quarter."""

    nodes: int = 1000
    blocks: int = 80
    hours: float = 1.0
    churn: float = 0.0
    flash_crowd: int = 0
    clients: int = 100
    seed: int = 0
    # For a test: what becomes of clients that forget whom they banned.
    forget_bans: bool = False

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.blocks < 1 or self.hours <= 0:
            raise BadRequest("a simulation needs at least one node, one block and some time")
        if self.churn < 0 or self.flash_crowd < 0 or self.clients < 0:
            raise BadRequest("--churn, --flash-crowd and --clients cannot be negative")

    @property
    def seconds(self) -> float:
        return self.hours * 3600
