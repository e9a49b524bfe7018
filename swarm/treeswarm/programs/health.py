"""Checks of a machine that both programs share, and the findings they return.

`swarm-node doctor` and `swarm doctor` put theirs together; `health_report.py` prints them.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from treeswarm.errors import SwarmError
from treeswarm.protocol.records import LIFETIME_S
from treeswarm.registry.clocks import CLOCK_SKEW_S

PYTHON = (3, 11)
# A node renews its record about once a minute, with jitter.  So the record of a node whose clock is right is not older
# than this when it is first received.
RENEWED_S = LIFETIME_S / 4
# A smaller difference is caused by the network, or does no harm.
NOTICED_S = 5.0


class Verdict(StrEnum):
    """Outcome of a check."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """Result of one check.  A finding that is not OK has a next step."""

    check: str
    """Name of the check, such as `clock`."""
    verdict: Verdict
    message: str
    """Text that says what the check found."""
    next_step: str = ""
    """Text that says what the user can do, or an empty string if the verdict is OK."""

    @classmethod
    def ok(cls, check: str, message: str) -> "Finding":
        """Return the finding of a check that passed."""
        return cls(check, Verdict.OK, message)

    @classmethod
    def warn(cls, check: str, message: str, next_step: str) -> "Finding":
        """Return a finding that does not keep the program from working."""
        return cls(check, Verdict.WARN, message, next_step)

    @classmethod
    def fail(cls, check: str, message: str, next_step: str) -> "Finding":
        """Return a finding that must be put right first."""
        return cls(check, Verdict.FAIL, message, next_step)

    @classmethod
    def of_error(cls, check: str, error: SwarmError, next_step: str = "") -> "Finding":
        """Return a failed check.  This project's errors end in a next step after their last colon."""
        message, _, ending = str(error).rpartition(": ")
        return cls.fail(check, message or ending, next_step or (ending if message else "see the message"))

    def as_json(self) -> dict[str, str]:
        """Return the finding under the keys that `doctor --json` promises."""
        return {"check": self.check, "verdict": self.verdict, "said": self.message, "next": self.next_step}


def any_failed(findings: Sequence[Finding]) -> bool:
    """Return whether at least one finding must be put right first."""
    return any(finding.verdict is Verdict.FAIL for finding in findings)


def check_python_version() -> Finding:
    """Check the version of the Python interpreter that runs this."""
    message = f"{sys.version.split()[0]} on {sys.platform}"
    if sys.version_info[:2] < PYTHON:
        return Finding.fail("python", message, f"install Python {'.'.join(map(str, PYTHON))} or newer")
    return Finding.ok("python", message)


def check_open_files(needed: int) -> Finding | None:
    """Check that `needed` sockets and files may be open at once.  Return None where the system has no such limit."""
    if sys.platform == "win32":
        return None
    import resource  # noqa: PLC0415  # Windows has no such module.

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return Finding.ok("open files", "no limit" if soft == resource.RLIM_INFINITY else f"up to {soft}")
    remedy = f"ulimit -n {needed}"
    if hard not in (resource.RLIM_INFINITY, -1) and hard < needed:
        remedy = f"let the system allow {needed} (LimitNOFILE= of a systemd unit, /etc/security/limits.conf)"
    return Finding.warn("open files", f"up to {soft}, a busy program needs {needed}", f"before starting it: {remedy}")


def check_clock(ages: Sequence[float], rejected: Mapping[str, int]) -> Finding:
    """Compare this machine's clock with the records of other nodes.

    `ages` are the seconds since each record says it was signed, by this machine's clock.  `rejected` is the number of
    records that were not believed, by reason.  The median age counts, so that one node with a wrong clock changes
    nothing.
    """
    next_step = "set this machine's clock by the network: timedatectl set-ntp true, or your system's time settings"
    future, old = rejected.get("from-the-future", 0), rejected.get("expired", 0)
    if future > len(ages):
        message = f"{future} records are dated in the future: this clock is over {CLOCK_SKEW_S:.0f} s late"
        return Finding.fail("clock", message, next_step)
    if old > len(ages):
        message = f"{old} records have expired: this clock is probably minutes ahead"
        return Finding.fail("clock", message, next_step)
    if not ages:
        message = "not compared: no record of another node was received"
        return Finding.warn("clock", message, "name a swarm with --registry")
    median = statistics.median(ages)
    off_s, direction = (-median, "late") if median < 0 else (median - RENEWED_S, "ahead")
    message = f"at least {off_s:.0f} s {direction} of {len(ages)} other nodes"
    if off_s > CLOCK_SKEW_S:
        return Finding.fail("clock", f"{message}: they reject this machine's records", next_step)
    if off_s > NOTICED_S:
        return Finding.warn("clock", message, next_step)
    return Finding.ok("clock", f"agrees with {len(ages)} other nodes")
