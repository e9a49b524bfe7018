"""Several drafters in one tree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.sampling import SamplingSettings
from treeswarm_client.drafters.calibration import Calibration
from treeswarm_client.drafters.seam import NO_TREE, Drafter, DraftTree, Verdict, in_no_hurry

NOT_THERE = -2


@dataclass(eq=False)
class UnionDrafter:
    members: Sequence[Drafter]
    mode: str = "max"
    name: str = "union"
    _trees: list[DraftTree] = field(default_factory=list)
    _tree: DraftTree = NO_TREE
    _depth: int = 0

    def __post_init__(self):
        self._cal = {}
        self._w = np.ones(len(self.members)) / len(self.members)

    @property
    def alternatives(self) -> int:
        return max(m.alternatives for m in self.members)

    def begin(self, prompt, settings):
        for m in self.members:
            m.begin(prompt, settings)
        self._trees = []

    def cal(self, key):
        return self._cal.setdefault(key, Calibration())

    def propose(self, size, depth, enough=in_no_hurry):
        self._trees = [m.propose(size, depth, enough) for m in self.members]
        nodes, order = self.merge()
        n = len(nodes)
        S = np.full((n, len(self.members)), -np.inf)
        for i, (parent, token, scores) in enumerate(nodes):
            for k, s in scores.items():
                S[i, k] = s
        chance = self.chances(S)
        for i, (p, _, _) in enumerate(nodes):
            if p >= 0:
                chance[i] = min(chance[i], chance[p])
        order = np.lexsort((np.arange(n), -chance))[:size]
        place = {int(o): i for i, o in enumerate(order)}
        return DraftTree(
            np.array([place[nodes[o][0]] if nodes[o][0] >= 0 else -1 for o in order], np.int64),
            np.array([nodes[o][1] for o in order], np.int64),
            np.log(np.maximum(chance[order], 1e-30)).astype(np.float32),
        )

    def keys(self, S):
        masks = np.isfinite(S) @ (1 << np.arange(S.shape[1]))
        for k in range(S.shape[1]):
            here = np.isfinite(S[:, k])
            if self.mode == "mask":
                for mask in np.unique(masks[here]):
                    yield k, (k, int(mask)), np.flatnonzero(here & (masks == mask))
            else:
                yield k, k, np.flatnonzero(here)

    def chances(self, S):
        C = np.zeros(S.shape)
        for k, key, rows in self.keys(S):
            C[rows, k] = self.cal(key).chances(S[rows, k])
        if self.mode == "raw":
            return np.exp(S).max(1, initial=0)
        if self.mode == "or":
            return 1 - (1 - C).prod(1)
        if self.mode == "first":
            return C[:, 0]
        return C.max(1, initial=0)

    def merge(self):
        nodes, at = [], {}
        for k, tree in enumerate(self._trees):
            places = []
            for parent, token, score in zip(tree.parents.tolist(), tree.tokens.tolist(), tree.scores.tolist()):
                above = places[parent] if parent >= 0 else -1
                i = at.get((above, token))
                if i is None:
                    i = at[above, token] = len(nodes)
                    nodes.append((above, token, {}))
                nodes[i][2][k] = score
                places.append(i)
        return nodes, at

    def observe(self, verdict):
        tree = verdict.tree
        if len(tree) and self._trees:
            nodes, at = self.merge()
            accepted = set(verdict.accepted)
            places = []
            S, hit = [], []
            for i, (p, t) in enumerate(zip(tree.parents.tolist(), tree.tokens.tolist())):
                above = places[p] if p >= 0 else -1
                j = at.get((above, t), -2)
                places.append(j)
                if j >= 0:
                    S.append([nodes[j][2].get(k, -np.inf) for k in range(len(self.members))])
                    hit.append(i in accepted)
            S, hit = np.array(S).reshape(-1, len(self.members)), np.array(hit, bool)
            for k, key, rows in self.keys(S):
                self._cal[key] = self.cal(key).learned(S[rows, k], hit[rows])
        for m in self.members:
            m.observe(verdict)
        self._trees = []
