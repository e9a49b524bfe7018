"""Every running node has an identity of its own, and the same one at every start."""

from pathlib import Path

import pytest

from treeswarm.errors import BadRequest
from treeswarm_node.membership.identity_file import claim_identity


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
