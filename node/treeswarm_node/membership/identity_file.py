"""Choose the identity of a node: the same one at every start, and no identity for two running nodes."""

import contextlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from treeswarm.errors import BadRequest
from treeswarm.keys import Identity
from treeswarm_node.membership.last_run import LastRun, read_last_run

# More nodes than this on one machine are a mistake.
MAX_IDENTITIES = 256


@contextlib.contextmanager
def claim_identity(path: Path | None = None, model: str = "", port: int = 0) -> Iterator[tuple[Identity, Path]]:
    """Yield an identity and the path of its file; no other node can claim it meanwhile.

    Without `path`, this is the first identity, in the order of `order_identities`, that no running node holds.  Raises
    BadRequest if another node holds `path`, and for a file that `Identity.load_or_create` refuses.
    """
    for candidate in [path] if path else _default_candidates(model, port):
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(_open_lock(lock_file(candidate)))
            if _try_lock(lock):
                yield Identity.load_or_create(candidate), candidate
                return
    raise BadRequest(
        f"another running node has the identity {path or default_identity_folder()}: "
        "give this node its own with --identity PATH"
    )


def order_identities(
    paths: Sequence[Path], last_runs: Sequence[LastRun | None], new: Sequence[Path], model: str, port: int
) -> list[Path]:
    """Return the identity files in the order in which a node that starts should try them.  Pure.

    `last_runs` belongs to `paths`; `new` are files that do not exist yet; `port` is 0 if the node may choose one.
    An identity belongs to a port, because addresses and join codes name both.  So those used last on this port come
    first, those of this model before others, the latest before older ones.  A node that may choose its port takes those
    of this model that did so, in the order of `paths`: several nodes that are started in the same order as before then
    keep their identities.  Then come identities that were never used, then new ones, and last those of other ports, the
    longest unused first.
    """
    known = list(zip(paths, last_runs, strict=True))
    own = [
        (run.model == model, run.used, path)
        for path, run in known
        if run is not None and _is_port_of(run, port) and (port or run.model == model)
    ]
    latest_first = sorted(own, key=lambda item: item[:2], reverse=True)
    first = [path for _, _, path in (latest_first if port else own)]
    unused = [path for path, run in known if run is None]
    others = sorted(known, key=lambda item: item[1].used if item[1] else math.inf)
    rest = [path for path, run in others if run is not None and path not in first]
    return [*first, *unused, *new, *rest]


def _is_port_of(run: LastRun, port: int) -> bool:
    return run.port == port if port else run.automatic


def _default_candidates(model: str, port: int) -> list[Path]:
    """Return `identity.pem`, `identity-2.pem` and so on, in the order in which to try them."""
    first = default_identity_folder() / "identity.pem"
    numbers = range(2, MAX_IDENTITIES + 1)
    paths = list(itertools.chain([first], (first.with_name(f"identity-{number}.pem") for number in numbers)))
    existing = [path for path in paths if path.exists()]
    return order_identities(
        existing,
        [read_last_run(path) for path in existing],
        [path for path in paths if path not in existing],
        model,
        port,
    )


def default_identity_folder() -> Path:
    """Return the folder where the user's programs keep their state."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "treeswarm"


@contextlib.contextmanager
def record_running(identity_path: Path, address: str) -> Iterator[None]:
    """Keep a file beside the identity that says at which address its node runs, for as long as it runs.

    Programs of this machine dial `address`, which has the pin of the node.
    """
    file = running_file(identity_path)
    file.write_text(json.dumps({"address": address}), "utf-8")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def running_address(identity_path: Path) -> str | None:
    """Return the address at which the node with this identity runs, or None if none runs.

    A node that was killed leaves its file behind, which does not count: nobody holds the identity's lock.
    """
    file = running_file(identity_path)
    try:
        address = json.loads(file.read_text("utf-8"))["address"]
        with lock_file(identity_path).open("ab") as lock:
            if sys.platform != "win32" and _try_lock(lock):
                file.unlink(missing_ok=True)
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(address)


def running_file(identity_path: Path) -> Path:
    """Return the path of the file that `record_running` keeps beside an identity."""
    return identity_path.with_suffix(".running")


def lock_file(identity_path: Path) -> Path:
    """Return the path of the file that a running node locks to hold an identity."""
    return identity_path.with_name(f"{identity_path.name}.lock")


def dht_key_file(identity_path: Path) -> Path:
    """Return the path of the key of the node's DHT peer."""
    return identity_path.with_name(f"{identity_path.name}.dht")


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
