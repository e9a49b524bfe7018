"""What is right with a machine and its swarm, what is not, and what to do about it: findings that both programs share.

`swarm-node doctor` and `swarm doctor` put theirs together; `health_text.py` shows them.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from treeswarm.errors import SwarmError
from treeswarm.protocol.records import LIFETIME_S
from treeswarm.registry.book import CLOCK_SKEW_S

PYTHON = (3, 11)
# A node renews its record each minute or so, with jitter: an honest one is no older when it is first heard of.
RENEWED_S = LIFETIME_S / 4
# Less is the network's doing, or of no matter.
NOTICED_S = 5.0


class Verdict(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What one check found.  Whatever is not ok has a next step."""

    check: str
    verdict: Verdict
    said: str
    next: str = ""

    @classmethod
    def ok(cls, check: str, said: str) -> "Finding":
        return cls(check, Verdict.OK, said)

    @classmethod
    def warn(cls, check: str, said: str, next_step: str) -> "Finding":
        return cls(check, Verdict.WARN, said, next_step)

    @classmethod
    def fail(cls, check: str, said: str, next_step: str) -> "Finding":
        return cls(check, Verdict.FAIL, said, next_step)

    @classmethod
    def of_error(cls, check: str, error: SwarmError, next_step: str = "") -> "Finding":
        """A failed check; the house's errors end in what to do."""
        said, _, ending = str(error).rpartition(": ")
        return cls.fail(check, said or ending, next_step or (ending if said else "see the message"))


def failed(findings: Sequence[Finding]) -> bool:
    """Whether anything must be put right first."""
    return any(finding.verdict is Verdict.FAIL for finding in findings)


def python_version() -> Finding:
    """Of this interpreter."""
    said = f"{sys.version.split()[0]} on {sys.platform}"
    if sys.version_info[:2] < PYTHON:
        return Finding.fail("python", said, f"install Python {'.'.join(map(str, PYTHON))} or newer")
    return Finding.ok("python", said)


def open_files(needed: int) -> Finding | None:
    """Whether so many sockets and files may be open at once; None where the system has no such limit."""
    if sys.platform == "win32":
        return None
    import resource  # noqa: PLC0415  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return Finding.ok("open files", "no limit" if soft == resource.RLIM_INFINITY else f"up to {soft}")
    how = f"ulimit -n {needed}"
    if hard not in (resource.RLIM_INFINITY, -1) and hard < needed:
        how = f"let the system allow {needed} (LimitNOFILE= of a systemd unit, /etc/security/limits.conf)"
    return Finding.warn("open files", f"up to {soft}, a busy program needs {needed}", f"before starting it: {how}")


def clock(ages: Sequence[float], rejected: Mapping[str, int]) -> Finding:
    """This machine's clock by others' records: `ages` are seconds since they say they were made, `rejected` counts
    those that were not believed, by reason.

    The median counts: one node with a wrong clock says nothing about this one.
    """
    step = "set this machine's clock by the network: timedatectl set-ntp true, or your system's time settings"
    future, old = rejected.get("from-the-future", 0), rejected.get("expired", 0)
    if future > len(ages):
        return Finding.fail("clock", f"{future} records are of the future: it is over {CLOCK_SKEW_S:.0f} s late", step)
    if old > len(ages):
        return Finding.fail("clock", f"{old} records have expired: it is probably minutes ahead", step)
    if not ages:
        return Finding.warn("clock", "not compared: no other node's record is known", "name a swarm with --registry")
    middle = statistics.median(ages)
    off, which = (-middle, "late") if middle < 0 else (middle - RENEWED_S, "ahead")
    if off > CLOCK_SKEW_S:
        return Finding.fail("clock", f"at least {off:.0f} s {which} of {len(ages)} others: none believes it", step)
    if off > NOTICED_S:
        return Finding.warn("clock", f"at least {off:.0f} s {which} of {len(ages)} others", step)
    return Finding.ok("clock", f"agrees with {len(ages)} others")
