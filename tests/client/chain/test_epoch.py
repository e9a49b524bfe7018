"""What a policy is told of the nodes of an epoch."""

import pytest

from treeswarm_client.chain.epoch import is_own_address


@pytest.mark.parametrize(
    ("host", "is_own"),
    [("127.0.0.1", True), ("192.0.2.7", False), ("2001:db8::7", False), ("nodes.example.org", False), ("", False)],
)
def test_own_addresses_are_those_of_this_machine(host: str, is_own: bool) -> None:
    """The others are reserved for documentation, so that no machine has them."""
    assert is_own_address(host) == is_own
