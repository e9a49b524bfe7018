"""`treeswarm.protocol.address` splits the peer of a stream into host and port."""

import pytest

from treeswarm.protocol.address import host_of


@pytest.mark.parametrize(
    ("peer", "host"), [("10.0.0.1:80", "10.0.0.1"), ("[::1]:80", "[::1]"), ("memory", "memory"), ("", "")]
)
def test_host_of_peer_excludes_the_port(peer: str, host: str) -> None:
    assert host_of(peer) == host
