"""What a client refuses and loads where a node is to drive, before any node is asked."""

import pytest

from treeswarm.errors import BadRequest
from treeswarm.model_files import resolve_model
from treeswarm_client.client import SwarmClient
from treeswarm_client.client_settings import DraftSettings, NodeSelection, check_drive
from treeswarm_client.opened_client import LoadedDrafters


@pytest.mark.parametrize(
    "drive", ["auto", "self", "127.0.0.1:4001", "host.example:1#" + "0f" * 16, "0123abcd", "a" * 32]
)
def test_a_driver_is_named_by_address_or_id(drive: str) -> None:
    check_drive(drive)


@pytest.mark.parametrize("drive", ["", "yes", "0123abc", "0123ABCD", "a" * 33])
def test_other_names_of_drivers_are_refused(drive: str) -> None:
    with pytest.raises(BadRequest, match="give auto, self, or a node"):
        check_drive(drive)


async def test_named_nodes_and_a_named_driver_contradict_each_other() -> None:
    """A driver chooses nodes by itself, and the user said which ones are to see the text."""
    with pytest.raises(BadRequest, match="you named them"):
        await SwarmClient(model="demo", peers="127.0.0.1:1", drive="127.0.0.1:1").__aenter__()


def test_a_client_with_a_driver_loads_no_draft_model_by_itself() -> None:
    nodes, folder = NodeSelection("demo", registry="127.0.0.1:1"), resolve_model("demo")
    modelless = LoadedDrafters.load(nodes, DraftSettings("auto").without_model(), folder, None)
    assert str(modelless.choice) == "draft: n-grams from the text, because a node drives the texts"
    named = LoadedDrafters.load(nodes, DraftSettings("tail").without_model(), folder, None)
    assert named.choice.name == "tail"
    assert LoadedDrafters.load(nodes, DraftSettings("auto"), folder, None).choice.name == "demo-draft+ngram"
