"""The assumptions and settings of a simulation.  Times are virtual seconds."""

from dataclasses import dataclass

from treeswarm.errors import BadRequest
from treeswarm.protocol.messages import MAX_RECORD_BYTES
from treeswarm.protocol.records import ANNOUNCE_EVERY_S, LIFETIME_S

# Registry: records live as long as the product's.  A record takes up to some seconds to be stored and found; readers
# read every ten.
RECORD_BYTES = MAX_RECORD_BYTES
ANNOUNCE_S, EXPIRY_S, POLL_S = float(ANNOUNCE_EVERY_S), float(LIFETIME_S), 10.0
PROPAGATION_S = (0.5, 5.0)

# Seconds after which a node that announced something reads the registry again: propagation, a poll and a margin.  A
# node that sees others on the same blocks chooses again at most so many times before it loads.
SETTLE_S, SETTLE_TIMES = 20.0, 3
# Seconds to load weights of some GB from disk or from a mirror.
LOAD_S = (30.0, 90.0)
# Seconds that nodes which leave or move give their sessions to end or to go elsewhere.
DRAIN_S = 30.0
# A node checks about every ten minutes whether it should move.
CHECK_S = (450.0, 750.0)
# Half of the nodes that vanish leave a machine that refuses connections; the others answer nothing, so that two probes
# of 4 and 8 s prove the death.  A node measures its distance to three others every 30 s, so each node is measured
# every 10 s, whatever the size of the swarm.
DARK, DARK_PROBE_S, ANSWER_S = 0.5, 12.0, 4.0
SURVEY_S = 10.0
# Seconds between two looks of a node at its probes, and until nodes far away have answered the one that claims blocks.
# It asks so many times, after so many seconds each, until other claims are withdrawn.
LOOK_S, ASK_S = 1.0, 1.0
CLAIM_CHECKS, CHECK_AGAIN_S = 4, 2.0
# Seconds until all readers have seen a claim, as the product's nodes wait if those asked are silent: the registry's
# lag, and a second.
CLAIM_S = PROPAGATION_S[1] + POLL_S + 1.0
# Share of leaving nodes that drain first: volunteers close a laptop as often as they stop the program.
GRACEFUL = 0.5

# One traversal carries a tree of 64 rows.  A consumer GPU of 1 TB/s runs a block of a 70B model in 8 bits (0.85 GB)
# about a thousand times per second, whatever the tree: 64,000 block-rows per second.  The median volunteer has half.
ROWS = 64
MEDIAN_RATE, RATE_SIGMA = 30_000.0, 0.8
# The median node has memory for some ten blocks of 0.85 GB.  Speed and memory are log-normal: many small, few large, as
# in every list of volunteers' hardware (BOINC's, Folding@home's).
MEDIAN_LENGTH, LENGTH_SIGMA = 10.0, 0.6
# The median node has room for 16 sessions.
MEDIAN_CACHE, CACHE_SIGMA, ROOM = 65_536, 0.5, 4096
# A node's own overhead per visit in seconds, and the share of its time that the rows of one session take.
OVERHEAD_S, DUTY = 0.004, 0.2

# A client's user reads for half a minute, then asks for text that takes two minutes.
THINK_S, SESSION_S = 30.0, 120.0
ATTEMPTS = 6
# Seconds until a client gives up a dead address; a refusal takes one round trip.
CONNECT_S, REFUSED_S = 2.0, 0.1
# Seconds until a client notices the loss of a node during a session.
NOTICE_S = 3.0

# Number of round trips that a new host measures, and the sigma of their log-normal error.
SAMPLES, RTT_NOISE = 32, 0.1
# Regions on a plane of round-trip seconds: America's east and west, Europe, India, East Asia, South America; the share
# of hosts in each, and how far they spread.
REGIONS = ((0.0, 0.0), (0.06, 0.01), (-0.08, 0.02), (-0.13, 0.13), (0.1, 0.15), (-0.02, -0.12))
REGION_SHARES = (0.25, 0.15, 0.3, 0.05, 0.2, 0.05)
REGION_SPREAD_S, ACCESS_S = 0.008, 0.006

# Seconds between two samples for the plot.
SAMPLE_S = 30.0


@dataclass(frozen=True)
class SimulationSettings:
    """What a user chooses about a simulation.  Raises BadRequest for settings that cannot be simulated."""

    nodes: int = 1000
    """Number of nodes online at the start."""
    blocks: int = 80
    """Number of decoder blocks of the model."""
    hours: float = 1.0
    """Number of virtual hours."""
    churn: float = 0.0
    """Share of nodes replaced per hour."""
    flash_crowd: int = 0
    """Number of nodes that join within one minute, after a quarter of the time."""
    holes: int = 0
    """Number of moments, spread over the time, at which all holders of a random block vanish."""
    probes: bool = True
    """Whether nodes probe others and fill holes; without, a lost node counts until its record expires."""
    clients: int = 100
    """Number of clients that generate text after text."""
    seed: int = 0
    """Seed of all random draws: the same settings give the same report, apart from its cost."""
    forget_bans: bool = False
    """Whether clients forget at every attempt which nodes they banned; for a test of what bans are worth."""

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.blocks < 1 or self.hours <= 0:
            raise BadRequest(
                f"cannot simulate {self.nodes} nodes, {self.blocks} blocks and {self.hours:g} hours: "
                "give at least one node, one block and more than 0 hours"
            )
        if self.churn < 0 or self.flash_crowd < 0 or self.clients < 0 or self.holes < 0:
            raise BadRequest("--churn, --flash-crowd, --holes and --clients cannot be negative: give 0 or more")

    @property
    def seconds(self) -> float:
        """Virtual seconds to simulate."""
        return self.hours * 3600
