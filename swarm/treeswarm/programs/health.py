"""Checks of a machine that both programs share, and the findings they return.

`swarm-node doctor` and `swarm doctor` put theirs together; `health_report.py` prints them.
"""

import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from treeswarm.errors import SwarmError
from treeswarm.programs.units import format_bytes
from treeswarm.registry.clocks import ClockSample, compare_clocks, set_clock

PYTHON = (3, 11)
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


def check_free_space(folder: Path, *, needed: float, enough: float, next_step: str) -> Finding:
    """Check the free space where `folder` is or will be: `needed` bytes at least, `enough` bytes to be content."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    message = f"{format_bytes(free)} free in {folder}"
    if free < needed:
        return Finding.fail("disk", message, next_step)
    if free < enough:
        return Finding.warn("disk", f"{message}, which the weights of a large model fill", next_step)
    return Finding.ok("disk", message)


def check_clock(samples: Collection[ClockSample]) -> Finding:
    """Compare this machine's clock with those of other nodes.

    Most of them must agree that it is wrong, so that one node with a wrong clock changes nothing.
    """
    usable = [sample for sample in samples if sample.difference_s is not None]
    if not usable:
        message = "not compared: no node said what time it has"
        return Finding.warn("clock", message, "name a swarm with --registry")
    if difference := compare_clocks(usable):
        # With a single other node to compare with, either clock may be the wrong one.
        make = Finding.fail if difference.is_certain else Finding.warn
        return make("clock", str(difference), set_clock(difference))
    if difference := compare_clocks(usable, NOTICED_S):
        return Finding.warn("clock", f"{difference}, which does no harm yet", set_clock(difference))
    return Finding.ok("clock", f"agrees with {len(usable)} other node{'s' if len(usable) > 1 else ''}")
