"""What an append costs a node besides the model.

Run `python -m treeswarm_bench.benchmarks.node_append [--profile]`; it prints one JSON object.

One process, the bundled model cut in three nodes' spans, bytes in and bytes out: each append is decoded, queued,
computed, encoded, as on a node, with nothing on a wire.  `bare_ms` is the same layers on the same rows called by
transformers itself with a cache of its own; `device_ms` what a node's device thread takes; `rest_ms` all else.
"""

import argparse
import asyncio
import cProfile
import json
import pstats
import statistics
import time
from dataclasses import dataclass, field
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
from treeswarm.wire.codec import decode_control_down, decode_link_up, encode
from treeswarm_node.config import NodeLimits
from treeswarm_node.engine.engine import Engine
from treeswarm_node.engine.model_runner import ModelRunner
from treeswarm_node.engine.sampler import Sampler
from treeswarm_node.kv_cache.replay_log import ReplayLogBudget
from treeswarm_node.model.loader import load_span
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.sessions.server_session import ServerSession
from treeswarm_node.sessions.session_parts import Opening, SessionClient, SessionMemory

SPANS = (Span(0, 3), Span(3, 5), Span(5, 8))
PROMPT, ROWS, ROUNDS = 48, 8, 300
ROOM = 4096
HOP = NextHop("nowhere:1", bytes(16))
TICKET = bytes(16)


@dataclass(eq=False)
class Wire:
    """Both ends of a stream: what is put in comes out of `receive`, what is sent lands in `sent`, as bytes."""

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


class Wires:
    """A transport whose every connection is the one wire."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    async def connect(self, target: str, kind: Any) -> Wire:
        return self.wire


def append(seq: int, first_id: int, tip: int, tokens: list[int], commit: list[int], *, prefill: bool) -> Append:
    rows = len(tokens)
    parents = [tip, *range(first_id, first_id + rows - 1)]
    return Append(
        epoch=0, seq=seq, commit=np.array(commit, np.uint32), first_id=first_id, parents=np.array(parents, np.uint32),
        tokens=np.array(tokens, np.uint32), prefill=prefill, answers=Answers.ALL, settings=SamplingSettings(),
        skipped=np.zeros(rows, np.bool_), fresh=True,
    )  # fmt: skip


async def measure(rounds: int, *, profile: bool, dtype: torch.dtype) -> dict[str, Any]:
    folder = resolve_model("demo")
    models = [SpanModel(load_span(folder, span, dtype, torch.device("cpu")), ROOM) for span in SPANS]
    hidden, vocab = models[0].hidden_size, int(models[0].loaded.config.vocab_size)
    row_bytes = hidden * dtype.itemsize
    numerics = NumericsClass(config_digest(read_config(folder)), "float32")
    nodes, tasks = [], []
    for model in models:
        span, wire, onward = model.loaded.span, Wire(), Wire()
        engine = Engine(ModelRunner(model, Sampler(vocab)), NodeLimits().budget)
        terms = SessionTerms(0, ROOM - 1024, 64, 10_000, vocab, 0 if span.start == 0 else row_bytes)
        hop = HOP if span.end < 8 else None
        wanted = Open(1, bytes(16), 0, span, numerics, ROOM - 1024, 64, TICKET, hop)
        journal = ReplayLogBudget(1 << 30).open(row_bytes, ROOM - 1024, 64) if hop else None
        hosted = ServerSession(
            Opening(wanted, engine, Wires(onward)),
            NodeSession(terms),
            SessionMemory(model.store.open(ROOM - 1024, 64), journal),
            SessionClient(onward, last_request_at=asyncio.get_running_loop().time()),
        )
        tasks += [asyncio.create_task(engine.run()), asyncio.create_task(hosted.read_link(wire))]
        nodes.append((wire, onward, hosted))
    await asyncio.sleep(0.01)
    for _, onward, _ in nodes[:-1]:
        onward.sent.get_nowait()  # the hello
    random = np.random.default_rng(1)
    first, tip, commit = 1, 0, []
    taken: list[list[float]] = [[] for _ in nodes]
    computed: list[list[float]] = [[] for _ in nodes]
    profiler = cProfile.Profile()
    for seq in range(rounds + 1):
        rows = ROWS if seq else PROMPT
        message = append(seq, first, tip, random.integers(0, vocab, rows).tolist(), commit, prefill=not seq)
        data = encode(message)
        commit, tip = ([first, first + 1, first + 2], first + 2) if seq else ([], PROMPT)
        first += rows
        if profile and seq == rounds // 3:
            profiler.enable()
        for i, (wire, onward, hosted) in enumerate(nodes):
            start = time.perf_counter()
            wire.inbox.put_nowait(data)
            data = await onward.sent.get()
            wall = time.perf_counter() - start
            timings = (decode_link_up if hosted.epoch.next_hop else decode_control_down)(data).timings
            if seq > rounds // 4:
                taken[i].append(1e3 * wall)
                computed[i].append(timings[-1].compute_us / 1e3)
    profiler.disable()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(35)
    bare = bare_ms(folder, rounds, dtype)
    rows_out = []
    for i, span in enumerate(SPANS):
        device = statistics.median(computed[i])
        rest = statistics.median(w - c for w, c in zip(taken[i], computed[i], strict=True))
        rows_out.append({"blocks": str(span), "device_ms": device, "rest_ms": rest})
    return {
        "rows": ROWS, "bare_ms_per_block": bare,
        "nodes": rows_out,
        "mean_rest_ms": statistics.mean(r["rest_ms"] for r in rows_out),
        "mean_device_ms": statistics.mean(r["device_ms"] for r in rows_out),
    }  # fmt: skip


@torch.inference_mode()
def bare_ms(folder: Any, rounds: int, dtype: torch.dtype) -> float:
    """A block's milliseconds in stock transformers on `ROWS` rows after about as long a text, head apart."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    taken = []
    base = model.base_model
    cache = DynamicCache(config=model.config)
    base(input_ids=torch.ones(1, PROMPT + 3 * rounds // 2, dtype=torch.long), past_key_values=cache, use_cache=True)
    for _ in range(min(rounds, 100)):
        start = time.perf_counter()
        base(input_ids=torch.ones(1, ROWS, dtype=torch.long), past_key_values=cache, use_cache=True)
        taken.append(1e3 * (time.perf_counter() - start))
        cache.crop(-ROWS)
    return statistics.median(taken) / len(base.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--profile", action="store_true", help="print where the event loop's thread spends its time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(asyncio.run(measure(args.rounds, profile=args.profile, dtype=torch.float32)), indent=1))


if __name__ == "__main__":
    main()
