"""Which identity this node takes: one a running node, the same one at every start."""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from treeswarm.errors import BadRequest
from treeswarm.keys import Identity

# More nodes than this on one machine are a mistake.
MOST = 256


@contextlib.contextmanager
def own_identity(path: Path | None = None) -> Iterator[tuple[Identity, Path]]:
    """The one kept at `path` and where, or the user's first that no running node holds; nobody else's while this lasts.

    Raises BadRequest when another node holds `path`, and for a file that `Identity.load_or_create` refuses.
    """
    for candidate in [path] if path else defaults():
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(_opened(candidate.with_name(f"{candidate.name}.lock")))
            if _taken(lock):
                yield Identity.load_or_create(candidate), candidate
                return
    raise BadRequest(
        f"another running node has the identity {path or defaults_folder()}: give this one its own with --identity PATH"
    )


def defaults() -> Iterable[Path]:
    """`identity.pem`, `identity-2.pem` and so on: where several nodes of one user find theirs again."""
    first = defaults_folder() / "identity.pem"
    return itertools.chain([first], (first.with_name(f"identity-{number}.pem") for number in range(2, MOST + 1)))


def defaults_folder() -> Path:
    """Where the user's programs keep their state."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "treeswarm"


@contextlib.contextmanager
def record_running(identity_path: Path, address: str) -> Iterator[None]:
    """Keep a file beside the identity that says at which address its node runs, for as long as it runs."""
    file = running_file(identity_path)
    file.write_text(json.dumps({"address": address}), "utf-8")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def running_file(identity_path: Path) -> Path:
    """Return the path of the file that `record_running` keeps beside an identity."""
    return identity_path.with_suffix(".running")


def _opened(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path.open("ab")
    except OSError as error:
        raise BadRequest(
            f"this node's identity cannot be kept in {path.parent} ({error.strerror}): give a path with --identity PATH"
        ) from None


def _taken(lock: IO[bytes]) -> bool:
    """Whether it is ours now, until closed."""
    if sys.platform == "win32":
        return True  # no flock there: give each node its own --identity
    import fcntl  # noqa: PLC0415

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
