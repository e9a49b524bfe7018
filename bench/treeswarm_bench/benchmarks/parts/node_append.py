"""`swarm bench node`: what an append costs a node besides the model.

One process hosts the bundled model, cut into the spans of three nodes.  Each append goes in and comes out as bytes: it
is decoded, queued, computed and encoded as on a node, without a wire.  `bare_ms_per_block` is the time of the same
layers on the same rows when transformers calls them with a cache of its own.  `device_ms` is what a node's device
thread takes; `rest_ms` is everything else.
"""

import asyncio
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from treeswarm.identity import config_digest
from treeswarm.model_files import read_config, resolve_model
from treeswarm.protocol.messages import Answers, Append, Message, NextHop, NumericsClass, Open
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm.transport.seam import Accept, Listener, StreamKind
from treeswarm.wire.codec import decode_control_down, decode_link_up, encode
from treeswarm_client.provenance import machine_provenance
from treeswarm_node.config import NodeLimits
from treeswarm_node.engine.engine import Engine
from treeswarm_node.engine.model_runner import ModelRunner
from treeswarm_node.engine.sampler import Sampler
from treeswarm_node.kv_cache.replay_log import ReplayLogBudget
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.sessions.server_session import ServerSession
from treeswarm_node.sessions.session_parts import Opening, SessionClient, SessionMemory

SPANS = (Span(0, 3), Span(3, 5), Span(5, 8))
BLOCKS = SPANS[-1].end
PROMPT, ROWS = 48, 8
# Number of an append's rows that the next one commits.
COMMITTED = 3
ROOM, SPARE_ROOM, CROWN_ROOM = 4096, 1024, 64
SEGMENT_ROWS = 10_000
REPLAY_LOG_BYTES = 1 << 30
HOP = NextHop("nowhere:1", bytes(16))
TICKET = bytes(16)
# The first quarter of the rounds warms up; the profile begins after a third.
WARM_UP_SHARE, PROFILE_SHARE = 4, 3
PROFILED_FUNCTIONS = 35
MOST_BARE_ROUNDS = 100
SETTLE_S = 0.01


@dataclass(eq=False)
class BytesStream:
    """A stream whose messages are put into `inbox` and taken from `sent` as bytes."""

    peer: str = "bench:1"
    ended: bool = False
    inbox: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    sent: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)

    async def send(self, message: Message) -> None:
        self.sent.put_nowait(encode(message))

    async def receive(self) -> Message | None:
        return decode_link_up(await self.inbox.get())

    async def end(self, error: Exception | None = None) -> None:
        self.ended = True


@dataclass(frozen=True)
class OneStreamTransport:
    """A transport that opens one and the same stream to every address."""

    stream: BytesStream

    async def connect(self, address: str, kind: StreamKind) -> BytesStream:
        return self.stream

    async def listen(self, address: str, accept: Accept) -> Listener:
        raise NotImplementedError

    async def close(self) -> None:
        """Nothing is open."""


@dataclass(eq=False)
class MeasuredNode:
    """One span's session, its two streams, and the milliseconds of its appends."""

    span: Span
    upstream: BytesStream
    downstream: BytesStream
    session: ServerSession
    tasks: Sequence["asyncio.Task[None]"]
    wall_ms: list[float] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, model: SpanModel, numerics: NumericsClass, row_bytes: int) -> "MeasuredNode":
        """Open a session of the whole room on one span, and start the tasks that serve it."""
        span, upstream, downstream = model.loaded.span, BytesStream(), BytesStream()
        vocab, room = int(model.loaded.config.vocab_size), ROOM - SPARE_ROOM
        engine = Engine(ModelRunner(model, Sampler(vocab)), NodeLimits().budget)
        terms = SessionTerms(0, room, CROWN_ROOM, SEGMENT_ROWS, vocab, 0 if span.start == 0 else row_bytes)
        hop = HOP if span.end < BLOCKS else None
        request = Open(1, bytes(16), 0, span, numerics, room, CROWN_ROOM, TICKET, hop)
        replay_log = ReplayLogBudget(REPLAY_LOG_BYTES).open(row_bytes, room, CROWN_ROOM) if hop else None
        session = ServerSession(
            Opening(request, engine, OneStreamTransport(downstream)),
            NodeSession(terms),
            SessionMemory(model.store.open(room, CROWN_ROOM), replay_log),
            SessionClient(downstream, last_request_at=asyncio.get_running_loop().time()),
        )
        tasks = [asyncio.create_task(engine.run()), asyncio.create_task(session.read_link(upstream))]
        return cls(span, upstream, downstream, session, tasks)

    async def forward(self, data: bytes, *, counts: bool) -> bytes:
        """Return what the node sends downstream for an append."""
        start = time.perf_counter()
        self.upstream.inbox.put_nowait(data)
        sent = await self.downstream.sent.get()
        wall_s = time.perf_counter() - start
        if counts:
            message: Any = (decode_link_up if self.session.epoch.next_hop else decode_control_down)(sent)
            self.wall_ms.append(1e3 * wall_s)
            self.device_ms.append(message.timings[-1].compute_us / 1e3)
        return sent

    def figures(self) -> dict[str, Any]:
        """Return the medians, for JSON."""
        rest_ms = [wall - device for wall, device in zip(self.wall_ms, self.device_ms, strict=True)]
        return {
            "blocks": str(self.span),
            "device_ms": statistics.median(self.device_ms),
            "rest_ms": statistics.median(rest_ms),
        }


async def bench_node(*, rounds: int, profile: bool) -> dict[str, Any]:
    """Send a prompt and `rounds` appends of 8 rows through three spans of the bundled model, in float32.

    With `profile`, print to standard error in which functions the event loop's thread spends its time.
    """
    torch.set_num_threads(1)
    folder, dtype = resolve_model("demo"), torch.float32
    models = [SpanModel(load_span(folder, span, dtype, torch.device("cpu")), ROOM) for span in SPANS]
    row_bytes = models[0].hidden_size * dtype.itemsize
    numerics = NumericsClass(config_digest(read_config(folder)), "float32")
    nodes = [MeasuredNode.start(model, numerics, row_bytes) for model in models]
    await asyncio.sleep(SETTLE_S)
    for node in nodes[:-1]:
        node.downstream.sent.get_nowait()  # the hello
    profiler = cProfile.Profile() if profile else None
    await _send_appends(nodes, rounds, int(models[0].loaded.config.vocab_size), profiler)
    tasks = [task for node in nodes for task in node.tasks]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if profiler is not None:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(PROFILED_FUNCTIONS)
    figures = [node.figures() for node in nodes]
    return {
        "bench": "node",
        "rows": ROWS,
        "rounds": rounds,
        "bare_ms_per_block": _bare_ms_per_block(folder, rounds, dtype),
        "nodes": figures,
        "mean_rest_ms": statistics.mean(node["rest_ms"] for node in figures),
        "mean_device_ms": statistics.mean(node["device_ms"] for node in figures),
        "provenance": machine_provenance(),
    }


async def _send_appends(
    nodes: Sequence[MeasuredNode], rounds: int, vocab: int, profiler: cProfile.Profile | None
) -> None:
    """Send the prompt and then `rounds` appends, each of which commits the first rows of the one before."""
    random = np.random.default_rng(1)
    first_id, tip = 1, 0
    commit: list[int] = []
    for seq in range(rounds + 1):
        rows = ROWS if seq else PROMPT
        data = encode(_append(seq, first_id, tip, random.integers(0, vocab, rows).tolist(), commit))
        commit = list(range(first_id, first_id + COMMITTED)) if seq else []
        tip = commit[-1] if commit else PROMPT
        first_id += rows
        if profiler is not None and seq == rounds // PROFILE_SHARE:
            profiler.enable()
        for node in nodes:
            data = await node.forward(data, counts=seq > rounds // WARM_UP_SHARE)
    if profiler is not None:
        profiler.disable()


def _append(seq: int, first_id: int, tip: int, tokens: list[int], commit: list[int]) -> Append:
    """Return a chain of rows below the tip; the first append is the prompt's prefill."""
    rows = len(tokens)
    return Append(
        epoch=0,
        seq=seq,
        commit=np.array(commit, np.uint32),
        first_id=first_id,
        parents=np.array([tip, *range(first_id, first_id + rows - 1)], np.uint32),
        tokens=np.array(tokens, np.uint32),
        prefill=seq == 0,
        answers=Answers.ALL,
        settings=SamplingSettings(),
        skipped=np.zeros(rows, np.bool_),
        fresh=True,
    )


@torch.inference_mode()
def _bare_ms_per_block(folder: Path, rounds: int, dtype: torch.dtype) -> float:
    """Return a block's milliseconds in stock transformers, LM head left out.

    The rows are as many, after a text of about the same length.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    taken = []
    base = model.base_model
    cache = DynamicCache(config=model.config)
    text = torch.ones(1, PROMPT + COMMITTED * rounds // 2, dtype=torch.long)
    base(input_ids=text, past_key_values=cache, use_cache=True)
    for _ in range(min(rounds, MOST_BARE_ROUNDS)):
        start = time.perf_counter()
        base(input_ids=torch.ones(1, ROWS, dtype=torch.long), past_key_values=cache, use_cache=True)
        taken.append(1e3 * (time.perf_counter() - start))
        cache.crop(-ROWS)
    return statistics.median(taken) / len(base.layers)
