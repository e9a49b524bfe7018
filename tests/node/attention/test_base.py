"""Every adapter agrees with attention computed along each row's path, on stores with fragmented trunks."""

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
from treeswarm_node.attention import base
from treeswarm_node.attention.base import Attention, LayerInputs
from treeswarm_node.attention.flash import FlashAttention, flash_kernel
from treeswarm_node.attention.metadata import Segment, make_batch
from treeswarm_node.kv_cache.kv_store import KVStore, SessionKV
from treeswarm_node.kv_cache.layer_state import KVShape

KernelResult = tuple[torch.Tensor, torch.Tensor]
HEADS, SHAPE = 4, KVShape(2, 16, 16)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}
# Options that layers use besides plain attention.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 50},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-2.0, 3.0, HEADS)},
    "window and sinks": {"window": 50, "sinks": torch.linspace(-2.0, 3.0, HEADS)},
}


@dataclass(eq=False)
class AttentionScene:
    """Runs sessions on one store with random queries, keys and values, and remembers keys and values by id."""

    adapter: Attention
    dtype: torch.dtype
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    store: KVStore = field(init=False)
    sessions: dict[str, tuple[NodeSession, SessionKV, Text]] = field(default_factory=dict)
    kv_of: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    max_runs: int = 0
    """Largest number of runs that a trunk had in any batch."""
    padded_batches: int = 0
    """Number of padded batches so far."""

    def __post_init__(self) -> None:
        self.store = KVStore({0: SHAPE}, 2048, self.dtype, CPU)
        self.generator = torch.Generator().manual_seed(7)

    def open(self, name: str, prompt: int) -> None:
        text = Text([1] * prompt, np.random.default_rng(len(self.sessions)), 2)
        session = NodeSession(SessionTerms(1, prompt + 60, 32, 10_000, 2, 0))
        self.sessions[name] = (session, self.store.open(prompt + 60, 32), text)

    def run(self, appends: dict[str, tuple[Append, list[int]]]) -> float:
        """Compute one batch of appends, given with their rows' ids, and return the largest difference.

        Values are about 1, so the difference is relative.
        """
        segments, rows = [], []
        for name, (append, ids) in appends.items():
            session, kv, _ = self.sessions[name]
            segments.append(Segment(kv, session.receive(append)[0], Span(0, 1)))
            rows += [(name, i) for i in ids]
        for segment in segments:
            segment.kv.commit(segment.step)
        query, key, value = (
            torch.randn(heads, len(rows), 16, generator=self.generator).to(self.dtype) for heads in (HEADS, 2, 2)
        )
        for i, row in enumerate(rows):
            self.kv_of[row] = key[:, i], value[:, i]
        batch = make_batch(segments, self.store, CPU)
        self.max_runs = max(self.max_runs, *(len(segment.trunk_runs) for segment in batch.segments))
        self.padded_batches += len(batch.groups(self.window).padded)
        options = {"scaling": 0.3, "window": self.window, "softcap": self.softcap, "sinks": self.sinks}
        output = self.adapter.attend(LayerInputs.with_kv_written(0, query, key, value, batch, **options))
        assert output.dtype == self.dtype
        assert output.shape == (len(rows), HEADS, 16)
        return max(
            float((output[i].float() - self.expected(row, query[:, i])).abs().max()) for i, row in enumerate(rows)
        )

    def expected(self, row: tuple[str, int], query: torch.Tensor) -> torch.Tensor:
        """Return the attention output of one row, float32 [heads, dim], computed along its path."""
        name, node = row
        visible = self.sessions[name][2].path(node)[-(self.window or 10_000) :]
        keys, values = (
            torch.stack([self.kv_of[name, i][kind] for i in visible], 1).float().repeat_interleave(HEADS // 2, 0)
            for kind in (0, 1)
        )
        scores = torch.einsum("hd,hkd->hk", query.float(), keys) * 0.3
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks[:, None]], 1)
            values = torch.cat([values, torch.zeros(HEADS, 1, 16)], 1)
        return torch.einsum("hk,hkd->hd", scores.softmax(-1), values)


def worst_difference(scene: AttentionScene, prompts: dict[str, int]) -> float:
    """Prefill in chunks, then run three trees per session with commits between, and return the largest difference.

    All sessions are in each batch.
    """
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
    scene = AttentionScene(ADAPTERS[name](), dtype, **KINDS[kind])
    assert worst_difference(scene, {"long": 150, "longer": 170, "short": 3, "empty": 0}) < TOLERANCES[dtype]
    assert scene.max_runs > 1
    assert scene.padded_batches


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_split_where_their_scores_take_too_much_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    attend_at_once, limit = base._attend_at_once, HEADS * 240

    def record(rows: base.QueryRows) -> torch.Tensor:
        keys = sum(part[0].shape[1] for part in (*rows.trunk, rows.crown))
        seen.append((rows.query.shape[1], HEADS * rows.query.shape[1] * keys))
        return attend_at_once(rows)

    monkeypatch.setattr(base, "MAX_SCORES", limit)
    monkeypatch.setattr(base, "_attend_at_once", record)
    scene = AttentionScene(ADAPTERS["torch"](), torch.float32, **KINDS[kind])
    assert worst_difference(scene, {"long": 150, "short": 3}) < TOLERANCES[torch.float32]
    assert max(scores for _, scores in seen) <= limit
    assert 29 not in {rows for rows, _ in seen}, "no chunk was split"


@pytest.mark.parametrize(("kind", "used"), [("plain", True), ("window", True), ("softcap", False), ("sinks", False)])
def test_kernel_is_used_only_where_it_is_supported(kind: str, used: bool) -> None:
    key_counts: list[int] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> KernelResult:
        key_counts.append(key.shape[1])
        return flash_kernel(query, key, value, scaling)

    scene = AttentionScene(FlashAttention(CPU, kernel), torch.float32, **KINDS[kind])
    assert worst_difference(scene, {"long": 150, "longer": 170}) < 1e-5
    assert bool(key_counts) == used
    assert all(key_counts), "the kernel must not be called without keys"


def without_logsumexp(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> KernelResult:
    """Return a part with a log-sum-exp of zero."""
    output, logsumexp = flash_kernel(query, key, value, scaling)
    return output, torch.zeros_like(logsumexp)


def with_log2(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> KernelResult:
    """Return a part with a log-sum-exp to base two, as some kernels do."""
    output, logsumexp = flash_kernel(query, key, value, scaling)
    return output, logsumexp / torch.tensor(2.0).log()


@pytest.mark.parametrize("kernel", [without_logsumexp, with_log2])
def test_wrong_logsumexp_changes_the_output(kernel: Callable[..., KernelResult]) -> None:
    assert (
        worst_difference(AttentionScene(FlashAttention(CPU, kernel), torch.float32), {"long": 150, "short": 3}) > 0.05
    )
