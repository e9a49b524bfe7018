"""Log-probabilities beside the chosen tokens: the model's own, before rules, temperature and filters.  Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from treeswarm.errors import BadRequest, Malformed
from treeswarm.protocol.messages import MAX_ALTERNATIVES, ScoredRows

TopLogprobs = tuple[tuple[int, float], ...]
"""Token ids and log-probabilities, best first."""


@dataclass(frozen=True)
class TokenLogprobs:
    """What the model thought of a token that was given."""

    id: int
    logprob: float
    top: TopLogprobs = ()
    """The likeliest tokens at its place, best first, as many as were asked for."""


@dataclass(frozen=True)
class LogprobWishes:
    """Which log-probabilities a generation brings beside those of its tokens.  Raises BadRequest for too many."""

    top: int = 0
    """Number of the likeliest tokens at the place of each generated one."""
    prompt: int | None = None
    """The same for each token of the prompt, or None if that is not scored at all."""

    def __post_init__(self) -> None:
        for name, count in (("top_logprobs", self.top), ("prompt_logprobs", self.prompt or 0)):
            if not 0 <= count <= MAX_ALTERNATIVES:
                raise BadRequest(f"{name} is {count}: give 0 to {MAX_ALTERNATIVES}")

    @property
    def alternatives(self) -> int:
        """Number of the target's best tokens that come with every row."""
        return max(self.top, self.prompt or 0)

    @property
    def wanted(self) -> bool:
        """Whether the tail must send more than the log-probability of the chosen token."""
        return self.top > 0 or self.prompt is not None

    def scored(self, tokens: Sequence[int], scored: ScoredRows | None) -> list[TokenLogprobs]:
        """Return what an answer says of the tokens that its append named.  Raises Malformed if it says less."""
        count = self.prompt or 0
        if not tokens:
            return []
        if scored is None or len(scored.logprobs) != len(tokens):
            raise Malformed("the tail did not score the tokens of the prompt")
        if count and not scored.alternative_logprobs.size:
            raise Malformed("the tail sent no log-probabilities of the best tokens")
        ids, logprobs = scored.alternatives[:, :count].tolist(), scored.alternative_logprobs[:, :count].tolist()
        top = (
            [tuple(zip(*pair, strict=True)) for pair in zip(ids, logprobs, strict=True)]
            if count
            else [()] * len(tokens)
        )
        rows = zip(tokens, scored.logprobs.tolist(), top, strict=True)
        return [TokenLogprobs(token, logprob, best) for token, logprob, best in rows]
