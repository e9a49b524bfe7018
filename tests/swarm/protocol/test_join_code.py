"""Join codes survive being read aloud, and a mistake in one is told as a mistake."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeswarm.errors import BadRequest
from treeswarm.protocol.address import Address
from treeswarm.protocol.join_code import ALPHABET, JoinCode, is_join_code

PIN = "5aff5640df2e00112233445566778899"
OPEN = JoinCode(Address("192.168.1.7", 35313, PIN))
PRIVATE = JoinCode(Address("192.168.1.7", 35313, PIN), "0c3f1")
SHORT = Address("192.168.1.7", 35313, PIN[:20])


def test_a_code_is_an_address_and_groups_of_four() -> None:
    assert str(OPEN) == "swarm:192.168.1.7:35313/bbzn-cg6z-5r01-28hk-khn9"
    assert re.fullmatch(r"swarm:192\.168\.1\.7:35313(/\w{4})(-\w{4}){5}", str(PRIVATE))
    assert JoinCode.parse(str(OPEN)) == JoinCode(SHORT)
    assert JoinCode.parse(str(PRIVATE)) == JoinCode(SHORT, "0c3f1")
    assert str(JoinCode.parse(str(PRIVATE))) == str(PRIVATE)


@given(
    st.sampled_from(["10.0.0.1", "::1", "node.example.org", "MY-HOST"]),
    st.integers(1, 65535),
    st.text("0123456789abcdef", min_size=32, max_size=32),
    st.sampled_from(["", "00000", "fffff", "0c3f1"]),
)
def test_every_code_is_read_as_it_was_meant(host: str, port: int, pin: str, marker: str) -> None:
    code = str(JoinCode(Address(host, port, pin), marker))
    place, letters = code.split("/")
    for written in (
        code,
        code.upper(),
        f"{place}/{letters.replace('-', ' ')}",
        f" {place}/{letters.replace('-', '')} ",
    ):
        assert JoinCode.parse(written) == JoinCode(Address(host.lower(), port, pin[:20]), marker)


def test_letters_that_look_alike_are_read_alike() -> None:
    place, letters = str(OPEN).split("/")
    for written in (letters.replace("0", "O").replace("1", "I"), letters.replace("1", "l"), letters.replace("-", "")):
        assert JoinCode.parse(f"{place}/{written}") == JoinCode(SHORT)


def test_every_single_typo_is_noticed() -> None:
    code, rng = str(PRIVATE), random.Random(5)
    place, letters = code.split("/")
    for i, letter in enumerate(letters):
        if letter != "-":
            other = rng.choice([c for c in ALPHABET if c != letter])
            with pytest.raises(BadRequest, match="has a typo, in the address or in the letters"):
                JoinCode.parse(f"{place}/{letters[:i]}{other}{letters[i + 1 :]}")
    for wrong in (place.replace("7:", "8:"), place.replace("35313", "35331")):
        with pytest.raises(BadRequest, match="has a typo"):
            JoinCode.parse(f"{wrong}/{letters}")
    swapped = letters[0] + letters[2] + letters[1] + letters[3:]
    with pytest.raises(BadRequest, match="has a typo"):
        JoinCode.parse(f"{place}/{swapped}")


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("swarm:192.168.1.7:35313", "needs an address and five or six groups"),
        ("swarm:192.168.1.7:35313/bbzn-cg6z-5r01-28hk", "not whole: .* 5 groups of 4, or 6 .* 16 characters"),
        ("swarm:192.168.1.7:35313/bbzn-cg6z-5r01-28hk-khn!", "'!' is in no code"),
        ("swarm:192.168.1.7:35313/bbzn-cg6z-5r01-28hk-khnu", "'u' is in no code"),
        ("swarm:192.168.1.7/bbzn-cg6z-5r01-28hk-khn9", "give HOST:PORT"),
        ("swarm:", "needs an address"),
        ("swarm:/", "not an address"),
    ],
)
def test_a_malformed_code_says_what_is_wrong(written: str, reason: str) -> None:
    assert is_join_code(written)
    with pytest.raises(BadRequest, match=reason):
        JoinCode.parse(written)


def test_the_pin_of_a_code_admits_its_key_alone() -> None:
    address = JoinCode.parse(str(OPEN)).address
    assert address.admits(PIN)
    assert not address.admits(PIN.replace("5aff", "5afe"))
    assert Address.parse(str(address)) == address
    assert Address("h", 1).admits(PIN)
