"""What one session takes from, and gives to, the trunks that a node keeps."""

from dataclasses import dataclass, field

from treeswarm.protocol.messages import Open
from treeswarm.protocol.prefix import PREFIX_TOKENS, Prefix, next_digest
from treeswarm.protocol.spans import Span
from treeswarm.session.steps import Step
from treeswarm_node.kv_cache.kv_store import SessionKV
from treeswarm_node.kv_cache.prefix_cache import UNIT_PAGES, PrefixCache, PrefixUnit
from treeswarm_node.kv_cache.replay_log import ReplayLog


@dataclass(eq=False)
class TrunkDigests:
    """The tokens of a trunk, for the digests of its whole units.  Pure."""

    scope: bytes
    digests: list[bytes] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)
    """After the last whole unit."""
    _crown: dict[int, int] = field(default_factory=dict)
    """Tokens by slot."""

    def record(self, step: Step) -> int:
        """Take a step's commits and rows; steps come in order.  Returns how many units became whole."""
        self._tokens += [self._crown[slot] for slot in step.commit_slots.tolist()]
        if step.append.prefill:
            self._tokens += step.tokens.tolist()
        else:
            self._crown.update(zip(step.slots.tolist(), step.tokens.tolist(), strict=True))
        before = len(self.digests)
        while len(self._tokens) >= PREFIX_TOKENS:
            last = self.digests[-1] if self.digests else b""
            self.digests.append(next_digest(self.scope, last, self._tokens[:PREFIX_TOKENS]))
            del self._tokens[:PREFIX_TOKENS]
        return len(self.digests) - before


@dataclass(eq=False)
class PrefixRecorder:
    """One session's.  It ends with the session's first loss of a node: what comes then came another way."""

    index: PrefixCache
    span: Span
    prefix: Prefix
    _trail: TrunkDigests | None = None
    """None until the first step, which says what of the offer is taken."""

    def record(self, step: Step, kv: SessionKV, journal: ReplayLog | None) -> None:
        """A step has been computed, and the journal, if there is one, has taken note of it: keep what became whole."""
        if self._trail is None:
            units = step.append.prefix // PREFIX_TOKENS
            self._trail = TrunkDigests(self.prefix.scope, list(self.prefix.digests[:units]))
            self.index.hits += units > 0
            self.index.hit_tokens += units * PREFIX_TOKENS
        new = self._trail.record(step)
        if not new:
            return
        first = (len(self._trail.digests) - new) * UNIT_PAGES
        starts = range(first, first + new * UNIT_PAGES, UNIT_PAGES)
        pages = [tuple(kv.trunk_pages[start : start + UNIT_PAGES]) for start in starts]
        chunks = [journal.freeze(PREFIX_TOKENS) if journal is not None else None for _ in pages]
        self.index.keep(self.span, self._trail.digests, [PrefixUnit(*unit) for unit in zip(pages, chunks, strict=True)])


def starts_from_prompt(wanted: Open) -> bool:
    """Whether a session begins here with its text, rather than goes on with one that came another way before."""
    return wanted.resumption is None or wanted.resumption.trunk_length == 0


def make_recorder(wanted: Open, index: PrefixCache) -> PrefixRecorder | None:
    """None for a session that shares nothing."""
    return (
        PrefixRecorder(index, wanted.span, wanted.prefix)
        if wanted.prefix is not None and starts_from_prompt(wanted)
        else None
    )
