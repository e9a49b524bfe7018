"""Join codes: one short address of a swarm, which people read aloud, and which nodes, clients and gateways take alike.

    swarm:192.168.1.7:4001/7k3m-9qxt-0d2f-w8hn-5r1c

A code names a node of the swarm: its address, the first 80 bits of its pin, in a private swarm a marker of the swarm's
key, and a checksum over all of this.  The node itself says where its swarm meets.
"""

import hashlib
from dataclasses import dataclass

from treeswarm.errors import BadRequest
from treeswarm.protocol.address import SHORT_PIN_DIGITS, Address

SCHEME = "swarm:"
# Crockford's alphabet: no i, l, o and u, which people take for 1, 1, 0 and v.
ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
MEANT = str.maketrans({"i": "1", "l": "1", "o": "0", "-": None, " ": None})
GROUP = 4
PIN_BITS, MARKER_BITS = 80, 20
# Of a million typed codes with a mistake, one is taken for right.
CHECK_BITS = 20
OPEN_CHARACTERS = (PIN_BITS + CHECK_BITS) // 5
PRIVATE_CHARACTERS = OPEN_CHARACTERS + MARKER_BITS // 5


@dataclass(frozen=True)
class JoinCode:
    """The address of a node, and what shows whether its swarm is private."""

    address: Address
    """Address of the node, with its whole pin or the first digits of it."""
    key_marker: str = ""
    """Marker of the private swarm's key (`keys.key_marker`), or "" for an open swarm."""

    def __str__(self) -> str:
        """Return the code as nodes print it."""
        pin = _to_letters(int(self._short_pin, 16), PIN_BITS)
        marker = _to_letters(int(self.key_marker, 16), MARKER_BITS) if self.key_marker else ""
        letters = pin + marker + self._check()
        groups = "-".join(letters[i : i + GROUP] for i in range(0, len(letters), GROUP))
        return f"{SCHEME}{self.address.bare.lower()}/{groups}"

    @property
    def _short_pin(self) -> str:
        return self.address.pin[:SHORT_PIN_DIGITS]

    def _check(self) -> str:
        text = f"{self.address.bare.lower()}|{self._short_pin}|{self.key_marker}"
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest())
        return _to_letters(digest % 2**CHECK_BITS, CHECK_BITS)

    @classmethod
    def parse(cls, text: str) -> "JoinCode":
        """Read a code in large or small letters, with or without hyphens.  Raises BadRequest."""
        place, slash, written = text.strip().lower().removeprefix(SCHEME).rpartition("/")
        if not slash:
            raise BadRequest(
                f"'{text}' is no join code: it needs an address and five or six groups of letters, as a node prints it "
                f"(such as {SCHEME}192.168.1.7:4001/7k3m-9qxt-…)"
            )
        address = Address.parse(place)
        letters = written.translate(MEANT)
        if strange := [letter for letter in letters if letter not in ALPHABET]:
            raise BadRequest(f"the join code '{text}' has a typo: '{strange[0]}' is in no code")
        if len(letters) not in {OPEN_CHARACTERS, PRIVATE_CHARACTERS}:
            raise BadRequest(
                f"the join code '{text}' is not whole: after the last / come {OPEN_CHARACTERS // GROUP} groups of "
                f"{GROUP}, or {PRIVATE_CHARACTERS // GROUP} for a private swarm, and here are {len(letters)} characters"
            )
        pin, marker = letters[: PIN_BITS // 5], letters[PIN_BITS // 5 : -CHECK_BITS // 5]
        code = cls(Address(address.host, address.port, _to_hex(pin)), _to_hex(marker))
        if code._check() != letters[-CHECK_BITS // 5 :]:
            raise BadRequest(
                f"the join code '{text}' has a typo, in the address or in the letters: compare it with what the node "
                "printed"
            )
        return code


def is_join_code(text: str) -> bool:
    """Return whether a text is meant as a join code."""
    return text.strip().lower().startswith(SCHEME)


def _to_letters(number: int, bits: int) -> str:
    return "".join(ALPHABET[number >> shift & 31] for shift in range(bits - 5, -1, -5))


def _to_hex(letters: str) -> str:
    number = 0
    for letter in letters:
        number = number << 5 | ALPHABET.index(letter)
    return f"{number:0{len(letters) * 5 // 4}x}" if letters else ""
