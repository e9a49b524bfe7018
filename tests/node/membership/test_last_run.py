"""What a node remembers of its last run: bounded, checked, and written whole or not at all."""

import json
import logging
import os
import socket
from pathlib import Path

import pytest

from treeswarm_node.membership.last_run import (
    FILE_BYTES,
    MAX_PEERS,
    LastRun,
    is_free,
    last_run_file,
    peers_to_rejoin,
    read_last_run,
    write_last_run,
)


def maddr(number: int, host: str = "10.0.0.1") -> str:
    return f"/ip4/{host}/tcp/4001/p2p/12D3KooW{'ABCDEFGHJKLMNPQRST'[number] * 44}"


NODE = f"10.0.0.1:4001#{'0' * 32}"
RUN = LastRun(
    "demo", True, 4001, 4002, "1a2b3", 5.0, "swarm:a:1/x", (maddr(0), maddr(1)), (f"10.0.0.1:4001#{'0' * 32}",)
)


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    identity = tmp_path / "identity.pem"
    assert read_last_run(identity) is None
    write_last_run(identity, RUN)
    assert read_last_run(identity) == RUN
    assert last_run_file(identity).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["identity.pem.state"]


def test_a_failed_write_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_last_run(tmp_path / "id", RUN)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    write_last_run(tmp_path / "id", LastRun("other"))
    assert read_last_run(tmp_path / "id") == RUN
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"\xff\xfe", b'{"port": 4001' + b" " * FILE_BYTES])
def test_a_damaged_file_is_reported_and_ignored(
    damaged: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last_run_file(tmp_path / "id").write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert read_last_run(tmp_path / "id") is None
    assert f"{last_run_file(tmp_path / 'id')} cannot be read" in caplog.text


def test_malformed_values_are_left_out() -> None:
    values = {
        "model": ["demo"], "automatic": "no", "port": 70_000, "dht_port": True, "used": "today",
        "key_marker": "x" * 600,
        "dht_peers": [maddr(0), "/ip4/10.0.0.1", 7, *[maddr(1)] * 50],
        "nodes": ["10.0.0.1:4001", f"10.0.0.1:4001#{'0' * 32}", "nowhere", None],
    }  # fmt: skip
    run = LastRun.parse(json.dumps(values))
    assert (run.model, run.automatic, run.port, run.dht_port, run.used, run.key_marker) == ("", True, 0, 0, 0.0, "")
    assert set(run.dht_peers) == {maddr(0), maddr(1)}
    assert len(run.dht_peers) <= MAX_PEERS
    assert run.nodes == (f"10.0.0.1:4001#{'0' * 32}",)


def test_peers_of_the_last_run_are_tried_for_the_same_swarm_only() -> None:
    moved = maddr(1, host="10.0.0.9")
    assert peers_to_rejoin([], RUN, "1a2b3") == RUN.dht_peers
    assert peers_to_rejoin([moved], RUN, "1a2b3") == RUN.dht_peers
    assert peers_to_rejoin([maddr(2)], RUN, "1a2b3") == ()
    assert peers_to_rejoin([], RUN, "") == ()
    assert peers_to_rejoin([], None, "") == ()


def test_a_port_is_free_until_a_program_listens_on_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not is_free("127.0.0.1", port)
        assert not is_free("0.0.0.0", port)
    assert is_free("127.0.0.1", port)
