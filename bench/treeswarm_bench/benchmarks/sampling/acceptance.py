"""The chance that the target's next token is among a node's children, under four rules.  Pure computation.

The children of one node, and the two distributions after it, are the same for all rules; each rule draws its own
children from the draft, since that is what makes it exact.
"""

from collections.abc import Callable, Mapping

import numpy as np

from treeswarm_bench.benchmarks.sampling.rejection import Probs, child_odds, draw_token, without_token

# Number of draws of children, and of noise, where a chance is an average over them.
DRAWS, NOISE_DRAWS = 12, 48
BISECTIONS = 40


def shared_noise(target: Probs, draft: Probs, children: int, random: np.random.Generator) -> float:
    """Ours: the children are the draft's best tokens under the noise with which the target chooses."""
    noise = random.gumbel(size=(NOISE_DRAWS, len(target)))
    with np.errstate(divide="ignore"):
        chosen = (np.log(target) + noise).argmax(1)
        scores = np.log(draft) + noise
    better = (scores > scores[np.arange(NOISE_DRAWS), chosen][:, None]).sum(1)
    return float((better < children).mean())


def k_sequential(target: Probs, draft: Probs, children: int, random: np.random.Generator) -> float:
    """SpecTr (arXiv 2310.15141): independent draws, each accepted with chance min(1, target / (ρ · draft)).

    ρ is the least value for which what is accepted never exceeds the target.
    """

    def accepted(rho: float) -> float:
        return float(np.minimum(target / rho, draft).sum())

    def any_accepted(rho: float) -> float:
        return 1.0 - (1.0 - accepted(rho)) ** children

    low, high = 1.0, float(max(children, 1))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if middle * accepted(middle) >= any_accepted(middle) else (middle, high)
    return any_accepted(high)


def recursive_rejection(target: Probs, draft: Probs, children: int, random: np.random.Generator) -> float:
    """SpecInfer (arXiv 2305.09781): independent draws, each tried on what the rejections before it left."""
    missed, rest = 1.0, target
    for _ in range(children):
        missed *= 1.0 - float(np.minimum(rest, draft).sum())
        excess = np.maximum(rest - draft, 0.0)
        mass = excess.sum()
        if mass <= 0.0:
            break
        rest = excess / mass
    return 1.0 - missed


def without_replacement(target: Probs, draft: Probs, children: int, random: np.random.Generator) -> float:
    """Multi-candidate sampling (arXiv 2401.06706, 2402.14160): the same with draws that never repeat a token."""
    chances = []
    for _ in range(DRAWS):
        left: Probs | None = draft
        tokens: list[int] = []
        while left is not None and len(tokens) < children:
            tokens.append(draw_token(left, random))
            left = without_token(left, tokens[-1])
        chances.append(1.0 - float(np.prod([1.0 - chance for chance in child_odds(target, draft, tokens).accepted])))
    return float(np.mean(chances))


Rule = Callable[[Probs, Probs, int, np.random.Generator], float]
RULES: Mapping[str, Rule] = {
    "shared noise (ours)": shared_noise,
    "k-sequential (SpecTr)": k_sequential,
    "recursive rejection (SpecInfer)": recursive_rejection,
    "without replacement (multi-candidate)": without_replacement,
}
