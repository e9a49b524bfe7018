"""One identity a running node, and the same one at every start."""

from pathlib import Path

import pytest

from treeswarm.errors import BadRequest
from treeswarm_node.membership.identity_file import claim_identity


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "treeswarm"


def test_nodes_on_one_machine_each_take_their_own_and_find_it_again(state: Path) -> None:
    with claim_identity() as (first, _), claim_identity() as (second, _):
        assert first.node_id != second.node_id
        assert first.pin != second.pin
        names = (first.node_id, second.node_id)
    with claim_identity() as (first, _), claim_identity() as (second, _):
        assert (first.node_id, second.node_id) == names
    assert sorted(path.name for path in state.glob("*.pem")) == ["identity-2.pem", "identity.pem"]


def test_a_path_of_ones_own_is_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "mine" / "node.pem"
    with (
        claim_identity(path) as (mine, _),
        pytest.raises(BadRequest, match=rf"another running node.*{path}.*--identity"),
        claim_identity(path),
    ):
        pass
    with claim_identity(path) as (again, _):
        assert again.pin == mine.pin


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    unkept = claim_identity(tmp_path / "file" / "node.pem")
    with pytest.raises(BadRequest, match=r"cannot be kept in .*file.*--identity PATH"), unkept:
        pass
