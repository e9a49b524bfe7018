"""Record the trunk of one session in the prefix cache."""

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
    """Computes the digests of a trunk's whole units from its tokens, without I/O."""

    scope: bytes
    """Key of the digests: what the client says its sessions share."""
    digests: list[bytes] = field(default_factory=list)
    """Digest of each whole unit, in order."""
    _tokens: list[int] = field(default_factory=list)
    """Tokens after the last whole unit."""
    _crown: dict[int, int] = field(default_factory=dict)
    """Token by crown slot."""

    def record(self, step: Step) -> list[tuple[int, ...]]:
        """Add a step's commits and rows, and return the tokens of the units that became whole.

        Steps must come in order.
        """
        self._tokens += [self._crown[slot] for slot in step.commit_slots.tolist()]
        if step.append.prefill:
            self._tokens += step.tokens.tolist()
        else:
            self._crown.update(zip(step.slots.tolist(), step.tokens.tolist(), strict=True))
        units: list[tuple[int, ...]] = []
        while len(self._tokens) >= PREFIX_TOKENS:
            last = self.digests[-1] if self.digests else b""
            self.digests.append(next_digest(self.scope, last, self._tokens[:PREFIX_TOKENS]))
            units.append(tuple(self._tokens[:PREFIX_TOKENS]))
            del self._tokens[:PREFIX_TOKENS]
        return units


@dataclass(eq=False)
class PrefixRecorder:
    """Records one session's whole units in the prefix cache.

    Recording ends when the session first loses a node, because later rows are computed in another way.
    """

    cache: PrefixCache
    span: Span
    prefix: Prefix
    """The prompt's prefix, as the client announced it."""
    _trunk: TrunkDigests | None = None
    """Digests of the trunk, or None until the first step, which says how much of the offered prefix is used."""

    def record(self, step: Step, kv: SessionKV, replay_log: ReplayLog | None) -> None:
        """Record a computed step: keep the units that became whole.

        If the session has a replay log, it must have recorded the step already.
        """
        if self._trunk is None:
            units = step.append.prefix // PREFIX_TOKENS
            self._trunk = TrunkDigests(self.prefix.scope, list(self.prefix.digests[:units]))
            self.cache.hits += units > 0
            self.cache.hit_tokens += units * PREFIX_TOKENS
        new_units = self._trunk.record(step)
        if not new_units:
            return
        first = (len(self._trunk.digests) - len(new_units)) * UNIT_PAGES
        starts = range(first, first + len(new_units) * UNIT_PAGES, UNIT_PAGES)
        pages = [tuple(kv.trunk_pages[start : start + UNIT_PAGES]) for start in starts]
        chunks = [replay_log.freeze(PREFIX_TOKENS) if replay_log is not None else None for _ in pages]
        kept = [PrefixUnit(*unit) for unit in zip(pages, chunks, new_units, strict=True)]
        self.cache.keep(self.span, self._trunk.digests, kept)


def starts_from_prompt(request: Open) -> bool:
    """Return whether the session starts with its prompt, rather than continuing a text computed elsewhere before."""
    return request.resumption is None or request.resumption.trunk_length == 0


def make_recorder(request: Open, cache: PrefixCache) -> PrefixRecorder | None:
    """Return a recorder for the session, or None if it shares nothing."""
    if request.prefix is None or not starts_from_prompt(request):
        return None
    return PrefixRecorder(cache, request.span, request.prefix)
