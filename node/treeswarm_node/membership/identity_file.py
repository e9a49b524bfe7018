"""Choose the identity of a node: the same one at every start, and no identity for two running nodes."""

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
MAX_IDENTITIES = 256


@contextlib.contextmanager
def claim_identity(path: Path | None = None) -> Iterator[tuple[Identity, Path]]:
    """Yield an identity and the path of its file; no other node can claim it meanwhile.

    Without `path`, this is the user's first identity that no running node holds.  Raises BadRequest if another node
    holds `path`, and for a file that `Identity.load_or_create` refuses.
    """
    for candidate in [path] if path else default_identity_paths():
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(_open_lock(candidate.with_name(f"{candidate.name}.lock")))
            if _try_lock(lock):
                yield Identity.load_or_create(candidate), candidate
                return
    raise BadRequest(
        f"another running node has the identity {path or default_identity_folder()}: "
        "give this node its own with --identity PATH"
    )


def default_identity_paths() -> Iterable[Path]:
    """Return `identity.pem`, `identity-2.pem` and so on, so that several nodes of one user find their own again."""
    first = default_identity_folder() / "identity.pem"
    numbers = range(2, MAX_IDENTITIES + 1)
    return itertools.chain([first], (first.with_name(f"identity-{number}.pem") for number in numbers))


def default_identity_folder() -> Path:
    """Return the folder where the user's programs keep their state."""
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


def _open_lock(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path.open("ab")
    except OSError as error:
        raise BadRequest(
            f"this node's identity cannot be kept in {path.parent} ({error.strerror}): give a path with --identity PATH"
        ) from None


def _try_lock(lock: IO[bytes]) -> bool:
    """Return whether this process holds the lock now; it does so until the file is closed."""
    if sys.platform == "win32":
        return True  # Windows has no flock: give each node its own --identity.
    import fcntl  # noqa: PLC0415

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
