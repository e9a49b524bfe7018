"""Every error that this project raises on purpose.

    SwarmError
    ├── BadRequest            the caller asked for something impossible: empty prompt, bad flag
    │   ├── DamagedFile       a key file that this program wrote is damaged
    │   └── TooLong           prompt and new tokens do not fit into the model's context
    ├── ModelError            a model directory is missing, partial, corrupt or unsupported
    │   └── UnsupportedModel  the model's layers failed a named check at load
    ├── RouteError            the known nodes do not make a whole model
    │   ├── MissingBlocks     no node serves some blocks, or none that can be used now
    │   ├── Mismatch          weights, numerics class or tokenizer differ
    │   ├── RecordsRejected   nodes announce themselves, and none of their records can be believed
    │   └── WrongClock        this machine's clock differs from the nodes', so that it cannot judge their records
    ├── TransportError        a stream or a connection failed
    │   ├── Unreachable       nothing answers at that address
    │   ├── Impostor          the node that answers there shows another key than expected
    │   └── LinkBroken        an open stream ended without an orderly end
    ├── ProtocolError         a peer broke the contract
    │   ├── Malformed         bytes that are not a message, or a field outside its limits
    │   └── Refused           a peer refused a request; it says why
    └── NodeLost              a node of the chain died during a generation

A message says what happened, at which node or file, and what to do.  Adapters translate at the border: no
`grpc.RpcError`, `OSError` or `KeyError` crosses it.
"""

from collections.abc import Sequence, Sized


class SwarmError(Exception):
    """The base of all errors of this project.  `str(error)` can be shown to a user."""


class BadRequest(SwarmError):
    """The caller asked for something impossible."""


class DamagedFile(BadRequest):
    """A file that this program keeps for the user is damaged; they restore or delete it."""


class TooLong(BadRequest):
    """Prompt and new tokens do not fit into the model's context."""


class ModelError(SwarmError):
    """A model directory cannot be used as it is."""


class UnsupportedModel(ModelError):
    """The model's layers failed a check at load; the message names the check."""


class RouteError(SwarmError):
    """The known nodes do not make a whole model."""


class MissingBlocks(RouteError):
    """No node serves some blocks, or none that serves them can be used now."""

    # Gaps are `protocol.spans.Span`, which is not imported here: spans raise errors of this module.

    gaps: Sequence[Sized] = ()
    """Blocks that no node serves, or empty if nodes serve them that cannot be used now."""

    @classmethod
    def of(cls, gaps: Sequence[Sized], blocks: int | None = None, others: str = "") -> "MissingBlocks":
        """Make the error that names `gaps` (spans, not empty) and says how to fill the first of them.

        `blocks` is the number of blocks of the whole model, where the message should name it.  `others` says which
        nodes serve the other blocks, and what those that had the missing ones do.
        """
        todo = f"start `swarm-node MODEL --blocks {gaps[0]}`, or wait until a node moves there"
        error = cls(f"{cls.phrase(gaps, blocks)}{f' ({others})' if others else ''}: {todo}")
        error.gaps = tuple(gaps)
        return error

    @staticmethod
    def phrase(gaps: Sequence[Sized], blocks: int | None = None, *, most: int | None = None) -> str:
        """Return "no node serves blocks 3:6, 8:9 of 9", with at most `most` gaps named and the others counted."""
        shown = gaps[:most]
        left = len(gaps) - len(shown)
        more = f" and {left} more gap{'s' if left > 1 else ''}" if left else ""
        of_all = "" if blocks is None else f" of {blocks}"
        plural = "s" if sum(map(len, gaps)) > 1 else ""
        return f"no node serves block{plural} {', '.join(map(str, shown))}{more}{of_all}"


class Mismatch(RouteError):
    """Two parties disagree on weights, numerics class or tokenizer."""


class RecordsRejected(RouteError):
    """Nodes announce themselves, and none of their records can be believed or used.  The message says why not."""


class WrongClock(RouteError):
    """This machine's clock differs so much from the nodes' that it cannot judge their records."""


class TransportError(SwarmError):
    """A stream or a connection failed."""


class Unreachable(TransportError):
    """Nothing answers at an address."""


class Impostor(TransportError):
    """The node that answers at an address shows another key than the one expected there."""


class LinkBroken(TransportError):
    """An open stream ended without an orderly end."""


class ProtocolError(SwarmError):
    """A peer broke the contract."""


class Malformed(ProtocolError):
    """Bytes are not a message, or a field is outside its limits."""


class Refused(ProtocolError):
    """A peer refused a request.  `code` is one of `treeswarm.protocol.messages.FaultCode`."""

    def __init__(self, message: str, code: str = "refused") -> None:
        super().__init__(message)
        self.code = code


class NodeLost(SwarmError):
    """A node of the chain died or stopped answering; `address` names it."""

    def __init__(self, message: str, address: str) -> None:
        super().__init__(message)
        self.address = address
