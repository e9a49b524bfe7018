"""Every adapter against attention done by hand along each row's path, on stores as sessions leave them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tests.node.conftest import ADAPTERS, CPU
from tests.support.texts import Text

from treeswarm.protocol.messages import Append
from treeswarm.protocol.spans import Span
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm_node.attention.base import Attention, LayerInputs
from treeswarm_node.attention.flash import FlashAttention, flash_kernel
from treeswarm_node.attention.metadata import Segment, make_batch
from treeswarm_node.kv_cache.kv_store import KVShape, KVStore, SessionKV

Parted = tuple[torch.Tensor, torch.Tensor]
HEADS, SHAPE = 4, KVShape(2, 16, 16)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}
# What layers ask for besides plain attention.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 50},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-2.0, 3.0, HEADS)},
    "window and sinks": {"window": 50, "sinks": torch.linspace(-2.0, 3.0, HEADS)},
}


@dataclass(eq=False)
class Scene:
    """Sessions on one store that attend to made-up queries, keys and values, remembered by id."""

    adapter: Attention
    dtype: torch.dtype
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    store: KVStore = field(init=False)
    sessions: dict[str, tuple[NodeSession, SessionKV, Text]] = field(default_factory=dict)
    known: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    most_runs: int = 0
    """Of a trunk, seen in any batch."""
    padded: int = 0
    """Formed so far."""

    def __post_init__(self) -> None:
        self.store = KVStore(1, SHAPE, 2048, self.dtype, CPU)
        self.random = torch.Generator().manual_seed(7)

    def open(self, name: str, prompt: int) -> None:
        text = Text([1] * prompt, np.random.default_rng(len(self.sessions)), 2)
        session = NodeSession(SessionTerms(1, prompt + 60, 32, 10_000, 2, 0))
        self.sessions[name] = (session, self.store.open(prompt + 60, 32), text)

    def run(self, appends: dict[str, tuple[Append, list[int]]]) -> float:
        """The largest difference in one batch of appends with their rows' ids, relative to values of about 1."""
        segments, rows = [], []
        for name, (append, ids) in appends.items():
            session, kv, _ = self.sessions[name]
            segments.append(Segment(kv, session.receive(append)[0], Span(0, 1)))
            rows += [(name, i) for i in ids]
        for segment in segments:
            segment.kv.commit(segment.step)
        query, key, value = (
            torch.randn(heads, len(rows), 16, generator=self.random).to(self.dtype) for heads in (HEADS, 2, 2)
        )
        for i, row in enumerate(rows):
            self.known[row] = key[:, i], value[:, i]
        batch = make_batch(segments, self.store, 0, CPU)
        self.most_runs = max(self.most_runs, *(len(meta.trunk_runs) for meta in batch.segments))
        self.padded += len(batch.groups(self.window).padded)
        how = {"scaling": 0.3, "window": self.window, "softcap": self.softcap, "sinks": self.sinks}
        ours = self.adapter.attend(LayerInputs.with_kv_written(0, query, key, value, batch, **how))
        assert ours.dtype == self.dtype
        assert ours.shape == (len(rows), HEADS, 16)
        return max(float((ours[i].float() - self.by_hand(row, query[:, i])).abs().max()) for i, row in enumerate(rows))

    def by_hand(self, row: tuple[str, int], query: torch.Tensor) -> torch.Tensor:
        """float32 [heads, dim]."""
        name, node = row
        seen = self.sessions[name][2].path(node)[-(self.window or 10_000) :]
        keys, values = (
            torch.stack([self.known[name, i][kind] for i in seen], 1).float().repeat_interleave(HEADS // 2, 0)
            for kind in (0, 1)
        )
        scores = torch.einsum("hd,hkd->hk", query.float(), keys) * 0.3
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks[:, None]], 1)
            values = torch.cat([values, torch.zeros(HEADS, 1, 16)], 1)
        return torch.einsum("hk,hkd->hd", scores.softmax(-1), values)


def worst_difference(scene: Scene, prompts: dict[str, int]) -> float:
    """Prefill in chunks, then three trees a session with commits between, all sessions in each batch."""
    for name, prompt in prompts.items():
        scene.open(name, prompt)
    texts = {name: text for name, (_, _, text) in scene.sessions.items()}
    prefills = {name: text.prefill(chunk=29) for name, text in texts.items()}
    worst = 0.0
    for i in range(max(map(len, prefills.values()), default=0)):
        chunk = {
            name: (appends[i], list(range(appends[i].first_id, appends[i].first_id + len(appends[i].tokens))))
            for name, appends in prefills.items()
            if i < len(appends)
        }
        worst = max(worst, scene.run(chunk))
    commits: dict[str, list[int]] = {name: [] for name in texts}
    for _ in range(3):
        trees = {name: text.tree(9, commits[name]) for name, text in texts.items()}
        worst = max(worst, scene.run(trees))
        for name, (_, ids) in trees.items():
            end = int(texts[name].random.choice(ids))
            commits[name] = [i for i in texts[name].path(end) if i in ids]
    return worst


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_sessions_of_all_lengths_in_one_batch(name: str, kind: str, dtype: torch.dtype) -> None:
    scene = Scene(ADAPTERS[name](), dtype, **KINDS[kind])
    assert worst_difference(scene, {"long": 150, "longer": 170, "short": 3, "empty": 0}) < TOLERANCES[dtype]
    assert scene.most_runs > 1
    assert scene.padded


@pytest.mark.parametrize(("kind", "used"), [("plain", True), ("window", True), ("softcap", False), ("sinks", False)])
def test_the_kernel_computes_what_it_can_and_nothing_else(kind: str, used: bool) -> None:
    asked: list[int] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> Parted:
        asked.append(key.shape[1])
        return flash_kernel(query, key, value, scaling)

    scene = Scene(FlashAttention(CPU, kernel), torch.float32, **KINDS[kind])
    assert worst_difference(scene, {"long": 150, "longer": 170}) < 1e-5
    assert bool(asked) == used
    assert all(asked), "no kernel is asked about no key"


def forgetful(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> Parted:
    """A part whose log-sum-exp is lost."""
    output, level = flash_kernel(query, key, value, scaling)
    return output, torch.zeros_like(level)


def in_bits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> Parted:
    """One to the base of two, as some kernels give it."""
    output, level = flash_kernel(query, key, value, scaling)
    return output, level / torch.tensor(2.0).log()


@pytest.mark.parametrize("kernel", [forgetful, in_bits])
def test_a_wrong_level_is_noticed(kernel: Callable[..., Parted]) -> None:
    assert worst_difference(Scene(FlashAttention(CPU, kernel), torch.float32), {"long": 150, "short": 3}) > 0.05
