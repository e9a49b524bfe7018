"""Says why a search found no node: dead addresses, records that are not believed, or a wrong clock.  Pure.

The fourth reason, blocks that no node serves, is found by those who know the model: see `errors.MissingBlocks`.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from treeswarm.errors import Impostor, RecordsRejected, Refused, RouteError, SwarmError, Unreachable, WrongClock
from treeswarm.protocol.messages import FaultCode
from treeswarm.registry.clocks import ClockDifference, ClockSample, set_clock

# Addresses and sources that a sentence names; the others are counted.
NAMED = 3
# Reasons that come from the dates of a record, which are judged by a clock.
DATES = frozenset({"expired", "from-the-future"})
# Reasons that are normal in a healthy swarm, and explain nothing.
NORMAL = frozenset({"stale", "too-many"})
MEANINGS = {
    "forged": "whose signature is not its node's",
    "expired": "expired",
    "from-the-future": "dated in the future",
    "other-version": "of another record version",
    "other-model": "of another model",
    "oversized": "too large",
    "malformed": "not readable as records",
    "misplaced": "stored under another node's name",
    "misdated": "stored with another expiry than their own",
}
NEXT_STEPS = {
    "other-model": "give --model as the nodes serve it; `swarm models` lists what they serve",
    "other-version": "install the same release here and on the nodes",
    "expired": "check the clocks of both machines, or wait a minute until the nodes announce themselves again",
    "from-the-future": "check the clocks of both machines",
}
FINAL_REFUSALS = frozenset({FaultCode.WRONG_SWARM_KEY, FaultCode.WRONG_VERSION})
NO_TRUST = "ask another node, since what this one passes on was changed on its way"


@dataclass(frozen=True)
class Rejection:
    """A record that was not believed."""

    reason: str
    """Key of `MEANINGS`, or another reason of a registry."""
    source: str = ""
    """Address that sent the record, or empty if the registry has no such thing."""
    address: str = ""
    """Address in the record, or empty if it cannot be read."""
    detail: str = ""
    """The name of the other model, or how the record differs, or empty."""


@dataclass(frozen=True)
class SearchReport:
    """What a search met that found no node."""

    asked: Collection[str] = ()
    """Addresses that were asked for records."""
    unanswered: Mapping[str, SwarmError] = field(default_factory=dict)
    """Why an address gave no records, by address."""
    rejections: Sequence[Rejection] = ()
    """The last record of each node that was not believed."""
    clock: ClockDifference | None = None
    samples: Sequence[ClockSample] = ()
    """What is known of the clocks of nodes."""


def explain_no_nodes(report: SearchReport) -> SwarmError:
    """Return the error that says why no node was found, and what to do."""
    rejections = [rejection for rejection in report.rejections if rejection.reason not in NORMAL]
    dated = [rejection for rejection in rejections if rejection.reason in DATES]
    if report.clock is not None and dated and 2 * len(dated) >= len(rejections):
        return explain_clock(report.clock, len(dated))
    if rejections:
        return RecordsRejected(describe_rejections(rejections))
    if report.unanswered:
        return explain_unanswered(report.unanswered)
    if report.asked:
        return Unreachable(
            f"no records came from {name_some(report.asked)}: check the addresses and that the nodes run"
        )
    return RouteError("no node announces itself here: start `swarm-node MODEL`, or check the name of the swarm")


def explain_clock(clock: ClockDifference, records: int = 0) -> WrongClock:
    """Return the error for a clock that differs, and because of which `records` records were not believed."""
    so = f", so that {records} record{'s' if records > 1 else ''} cannot be believed" if records else ""
    return WrongClock(f"{clock}{so}: {set_clock(clock)}")


def explain_unanswered(unanswered: Mapping[str, SwarmError]) -> SwarmError:
    """Return the error for addresses none of which gave records: the only one's own, or one that names all of them.

    A node that answers with another key, or refuses this program's swarm key or release, says more than silent ones.
    """
    errors = list(unanswered.values())
    telling = [error for error in errors if _is_answer(error)]
    if telling or len(set(map(str, errors))) == 1:
        return (telling or errors)[0]
    reasons = "; ".join(str(error).rpartition(": ")[0] or str(error) for error in errors[:NAMED])
    more = f"; and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
    return Unreachable(f"none of {len(errors)} addresses answers ({reasons}{more}): check them, and that the nodes run")


def _is_answer(error: SwarmError) -> bool:
    return isinstance(error, Impostor) or (isinstance(error, Refused) and error.code in FINAL_REFUSALS)


def describe_rejections(rejections: Sequence[Rejection]) -> str:
    """Return how many records were not believed, why, and from where, and what to do about the most common reason."""
    counts = Counter(rejection.reason for rejection in rejections)
    parts = []
    for reason, count in counts.most_common():
        those = [rejection for rejection in rejections if rejection.reason == reason]
        details = name_some(dict.fromkeys(rejection.detail for rejection in those if rejection.detail))
        nodes = name_some(dict.fromkeys(rejection.address for rejection in those if rejection.address))
        notes = ", ".join(filter(None, (details, f"of {nodes}" if nodes else "")))
        parts.append(f"{count} {MEANINGS.get(reason, reason)}{f' ({notes})' if notes else ''}")
    sources = name_some(dict.fromkeys(rejection.source for rejection in rejections if rejection.source))
    plural = "record" if len(rejections) == 1 else "records"
    came = f"{len(rejections)} {plural} came{f' from {sources}' if sources else ''}"
    next_step = NEXT_STEPS.get(counts.most_common(1)[0][0], NO_TRUST)
    return f"{came} and none can be used, {', '.join(parts)}: {next_step}"


def name_some(names: Collection[str], most: int = NAMED) -> str:
    """Return the first `most` names, separated by commas, and the number of the others."""
    shown = list(names)[:most]
    left = len(names) - len(shown)
    return ", ".join(shown) + (f" and {left} more" if left else "")
