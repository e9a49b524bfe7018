"""What a node remembers of its last run: model, ports and peers, in a file beside its identity."""

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from treeswarm.errors import BadRequest
from treeswarm.keys import write_private
from treeswarm.protocol.address import Address
from treeswarm.registry.book import BookRegistry
from treeswarm.registry.spec import MADDR

log = logging.getLogger(__name__)

# Of so many peers one still answers when most of a swarm is gone, and dialling all of them at once is cheap.
MAX_PEERS = 16
# Many times the size of a file with the largest number of the longest addresses.
FILE_BYTES = 1 << 15
MAX_TEXT = 512
# A node that joins and is the only one left within this time is found all the same: it dials this one.
RECORD_EVERY_S = 5.0


@dataclass(frozen=True)
class LastRun:
    """A node's settings and neighbours when it last ran."""

    model: str = ""
    """Name of the model, as the owner gave it."""
    automatic: bool = True
    """Whether the owner left the choice of the port to the node."""
    port: int = 0
    """Port that the node listened on, or 0 if unknown."""
    dht_port: int = 0
    """Port of its DHT peer, or 0 if it had none."""
    key_marker: str = ""
    """Marker of the private swarm's key, or "" for an open swarm."""
    used: float = 0.0
    """Time of the start, in seconds since 1970."""
    registry: str = ""
    """Value of `--registry`, or "" if it was not given."""
    dht_peers: tuple[str, ...] = ()
    """Multiaddresses of other DHT peers, those connected last first."""
    nodes: tuple[str, ...] = ()
    """Addresses with pins of other nodes."""

    @classmethod
    def parse(cls, text: str) -> "LastRun":
        """Read what `as_text` wrote; leave out what is malformed.  Raises ValueError if nothing can be read."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        used = values.get("used")
        return cls(
            model=_text(values, "model"),
            automatic=values.get("automatic") is not False,
            port=_port(values, "port"),
            dht_port=_port(values, "dht_port"),
            key_marker=_text(values, "key_marker"),
            used=float(used) if isinstance(used, int | float) else 0.0,
            registry=_text(values, "registry"),
            dht_peers=tuple(text for text in _texts(values, "dht_peers") if MADDR.fullmatch(text)),
            nodes=tuple(text for text in _texts(values, "nodes") if _is_address(text)),
        )

    def as_text(self) -> str:
        """Return the run as JSON."""
        return json.dumps(asdict(self), indent=1)


@dataclass(eq=False)
class RunRecorder:
    """Keeps the file about a node's run up to date while `run` runs."""

    identity_path: Path
    current: LastRun
    """The present run, as the file has it."""
    registry: BookRegistry
    node: str
    """The node's own id."""
    started: float = field(default_factory=time.time)

    async def run(self) -> None:
        """Write the file whenever the swarm has changed, until cancelled."""
        while True:
            await asyncio.sleep(RECORD_EVERY_S)
            self.write()

    def write(self) -> None:
        """Write the file if it would differ from the present one.

        Where no other node is known, those of the last run stay: they may come back.
        """
        dht_peers: list[str] = getattr(self.registry, "known_peers", list)()
        dht_port = getattr(self.registry, "port", 0)
        others = [s.record for s in self.registry.book.alive() if s.record.node != self.node and s.record.pin]
        others.sort(key=lambda record: (not record.reachable, -record.generation))
        nodes = [record.dial for record in others]
        run = replace(
            self.current,
            used=self.started,
            dht_port=dht_port,
            dht_peers=tuple(dht_peers)[:MAX_PEERS] or self.current.dht_peers,
            nodes=tuple(nodes)[:MAX_PEERS] or self.current.nodes,
        )
        if _without_order(run) != _without_order(self.current):
            self.current = run
            write_last_run(self.identity_path, run)


def _without_order(run: LastRun) -> tuple[LastRun, frozenset[str], frozenset[str]]:
    """Return what makes two runs differ: another order of the same neighbours is not worth writing a file."""
    return replace(run, nodes=(), dht_peers=()), frozenset(run.nodes), frozenset(run.dht_peers)


def last_run_file(identity_path: Path) -> Path:
    """Return the path of the file that says how the node with this identity ran last."""
    return identity_path.with_name(f"{identity_path.name}.state")


def read_last_run(identity_path: Path) -> LastRun | None:
    """Return how the node with this identity ran last, or None if it never did or its file is damaged."""
    file = last_run_file(identity_path)
    try:
        with file.open("rb") as opened:
            return LastRun.parse(opened.read(FILE_BYTES).decode())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): the node starts without its earlier port and peers", file, error)
        return None


def write_last_run(identity_path: Path, run: LastRun) -> None:
    """Replace the file at once, so that a crash leaves the old one or the new one.  A full disk is no error."""
    with suppress(OSError):
        write_private(last_run_file(identity_path), run.as_text().encode(), replace=True)


def is_free(host: str, port: int) -> bool:
    """Return whether a program could listen on this port now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if os.name == "posix":  # On Windows the option would let two programs share the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not matter
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def peers_to_rejoin(named: Sequence[str], last: LastRun | None, key_marker: str) -> tuple[str, ...]:
    """Return the DHT peers of the last run through which a node may look for its swarm.  Pure.

    `named` are the peers that the owner names now.  If none of them belongs to the last run, this is another swarm:
    the peers of the last one would join the two.  The same holds for another swarm key.
    """
    if last is None or last.key_marker != key_marker:
        return ()
    if named and not {peer_id(maddr) for maddr in named} & {peer_id(maddr) for maddr in last.dht_peers}:
        return ()
    return last.dht_peers


def peer_id(maddr: str) -> str:
    """Return the peer's id in a multiaddress."""
    return maddr.rpartition("/")[2]


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) and len(value) <= MAX_TEXT else ""


def _texts(values: Mapping[str, Any], name: str) -> list[str]:
    listed = values.get(name)
    texts = listed if isinstance(listed, list) else []
    return [text for text in texts if isinstance(text, str) and len(text) <= MAX_TEXT][:MAX_PEERS]


def _port(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**16 else 0


def _is_address(text: str) -> bool:
    try:
        return Address.parse(text).pin != ""
    except BadRequest:
        return False
