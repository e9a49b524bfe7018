"""Every running node has an identity of its own, and the same one at every start."""

from pathlib import Path

import pytest

from treeswarm.errors import BadRequest, DamagedFile
from treeswarm_node.membership.identity_file import (
    claim_identity,
    order_identities,
    record_running,
    running_address,
    running_file,
)
from treeswarm_node.membership.last_run import LastRun, write_last_run


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "treeswarm"


def test_nodes_on_one_machine_claim_their_own_identities_again(state: Path) -> None:
    with claim_identity() as (first, _), claim_identity() as (second, _):
        assert first.node_id != second.node_id
        assert first.pin != second.pin
        names = (first.node_id, second.node_id)
    with claim_identity() as (first, _), claim_identity() as (second, _):
        assert (first.node_id, second.node_id) == names
    assert sorted(path.name for path in state.glob("*.pem")) == ["identity-2.pem", "identity.pem"]


def test_an_identity_path_is_claimed_by_one_node_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "mine" / "node.pem"
    with (
        claim_identity(path) as (first, _),
        pytest.raises(BadRequest, match=rf"another running node.*{path}.*--identity"),
        claim_identity(path),
    ):
        pass
    with claim_identity(path) as (again, _):
        assert again.pin == first.pin


def test_an_identity_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    claim = claim_identity(tmp_path / "file" / "node.pem")
    with pytest.raises(BadRequest, match=r"cannot be kept in .*file.*--identity PATH"), claim:
        pass


A, B, C, D, NEW = (Path(f"{name}.pem") for name in "abcdn")


def run(model: str, port: int, used: float, *, automatic: bool = False) -> LastRun:
    return LastRun(model, automatic, port, used=used)


@pytest.mark.parametrize(
    ("model", "port", "order"),
    [
        ("demo", 4001, [B, A, C, D, NEW]),  # the latest of this port and model, then this port
        ("demo", 4009, [D, NEW, A, C, B]),  # nobody's port: never one that belongs to another port, if possible
        ("other", 4001, [C, B, A, D, NEW]),
        ("demo", 0, [D, NEW, A, C, B]),
    ],
)
def test_an_identity_belongs_to_the_port_it_was_used_on(model: str, port: int, order: list[Path]) -> None:
    runs = [run("demo", 4001, 1.0), run("demo", 4001, 3.0), run("other", 4001, 2.0), None]
    assert order_identities([A, B, C, D], runs, [NEW], model, port) == order


def test_an_automatic_port_goes_with_the_model_that_had_it() -> None:
    runs = [run("demo", 4001, 1.0), run("demo", 41000, 2.0, automatic=True), run("other", 42000, 3.0, automatic=True)]
    assert order_identities([A, B, C], runs, [NEW], "demo", 0) == [B, NEW, A, C]
    assert order_identities([A, B, C], runs, [NEW], "demo", 42000) == [C, NEW, A, B]


def test_nodes_started_in_the_same_order_keep_their_identities() -> None:
    """Neither knows its port, so only the order of the files can tell which of them is the first."""
    runs = [run("demo", 41000 + number, used, automatic=True) for number, used in enumerate([2.0, 3.0, 1.0])]
    assert order_identities([A, B, C], runs, [NEW], "demo", 0) == [A, B, C, NEW]


def test_a_node_keeps_its_identity_where_others_lie_about(state: Path) -> None:
    with claim_identity() as (_, first), claim_identity() as (second, path):
        write_last_run(first, run("demo", 4002, 9.0))
        write_last_run(path, run("demo", 4001, 1.0))
    with claim_identity(model="demo", port=4001) as (again, _):
        assert again.pin == second.pin
        with claim_identity(model="demo", port=4001) as (_, another):
            assert another.name == "identity-3.pem"


def test_a_killed_node_counts_as_not_running(tmp_path: Path) -> None:
    path, address = tmp_path / "node.pem", f"127.0.0.1:4001#{'0' * 32}"
    with claim_identity(path), record_running(path, address):
        assert running_address(path) == address
        left_behind = running_file(path).read_bytes()
    assert running_address(path) is None
    running_file(path).write_bytes(left_behind)
    assert running_address(path) is None
    assert not running_file(path).exists()


@pytest.mark.parametrize("damaged", [b"", b"no json", b"[]", b"{}"])
def test_a_damaged_running_file_counts_as_not_running(damaged: bytes, tmp_path: Path) -> None:
    running_file(tmp_path / "node.pem").write_bytes(damaged)
    with claim_identity(tmp_path / "node.pem"):
        assert running_address(tmp_path / "node.pem") is None


def test_a_damaged_identity_is_named_with_what_to_do(state: Path) -> None:
    state.mkdir(parents=True)
    path = state / "identity.pem"
    path.touch(mode=0o600)
    claim = claim_identity()
    with pytest.raises(DamagedFile, match=rf"{path} is damaged \(it has 0 keys.*restore it.*or delete it"), claim:
        pass
