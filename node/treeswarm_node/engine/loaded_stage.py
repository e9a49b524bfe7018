"""Load a span on this machine, check it against plain transformers, and measure it."""

import asyncio
import contextlib
import ctypes
import gc
import logging
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from treeswarm.errors import BadRequest, ModelError
from treeswarm.grammar.loading import GrammarLoader
from treeswarm.identity import config_digest, weights_digest
from treeswarm.model_files import HubOptions, ModelShape, read_config, read_shape, resolve_model
from treeswarm.programs.units import format_bytes
from treeswarm.progress import PROVING, Progress
from treeswarm.protocol.messages import NumericsClass, Profile, Resumption
from treeswarm.protocol.spans import Span
from treeswarm.session.replay import replay
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.config import NodeConfig
from treeswarm_node.engine.activation_codec import make_row_codec
from treeswarm_node.engine.counters import Counters
from treeswarm_node.engine.engine import Engine
from treeswarm_node.engine.latency_profile import measure_profile
from treeswarm_node.engine.model_runner import ModelRunner, Runner, ThrottledRunner
from treeswarm_node.engine.sampler import Sampler
from treeswarm_node.engine.step_rules import GrammarThread
from treeswarm_node.engine.tap_slice import TapSlice
from treeswarm_node.kv_cache.kv_store import KVStore
from treeswarm_node.model.attention_selection import choose_attention
from treeswarm_node.model.block_fit import choose_holding
from treeswarm_node.model.check.family_check import check_family
from treeswarm_node.model.check.fused_check import fuse_blocks
from treeswarm_node.model.check.kernel_check import check_kernels
from treeswarm_node.model.check.weights import check_weights
from treeswarm_node.model.checkpoint.formats import check_format
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.model.checkpoint.text_part import find_block_of, tensors_to_load
from treeswarm_node.model.loaded_span import ServedSpan
from treeswarm_node.model.memory_fit import NodeRoom, free_memory, offload_room, peak_bytes, room_for_speculator
from treeswarm_node.model.offload import Offload, open_offload
from treeswarm_node.model.quantization.packed_products import pack_products
from treeswarm_node.model.quantization.weight_kinds import check_kind
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.model.weight_layout import choose_layouts
from treeswarm_node.speculator.finding import AUTO, NONE, find_speculator
from treeswarm_node.speculator.loading import load_speculator, load_tap_slice
from treeswarm_node.speculator.seam import Speculator

log = logging.getLogger(__name__)

# Number of rows of a usual tree: the nodes of a swarm are compared by their rate on such trees.
RATE_ROWS = 64
RATE_RUNS = 5


@dataclass(frozen=True, eq=False)
class LoadedStage:
    """Holds what a node serves at the moment."""

    served: ServedSpan
    engine: Engine
    store: KVStore
    rate: float
    """Number of block-rows per second, measured on trees of `RATE_ROWS` rows."""
    profile: Profile = ()
    """Latency profile of a forward through the whole span, which clients receive."""
    shares_prefixes: bool = True
    """Whether K and V depend on the text alone, so that sessions may share them."""
    holds_codes: bool = False
    """Whether weights are held in the bits in which they were published."""
    speculator: Speculator | None = None
    """Speculator that proposes trees below the ends of walks, or None unless this node is a tail that has one."""
    tap_slice: TapSlice | None = None
    """Part of a head's first matrix by which this node adds its taps to those of other nodes, or None for none."""
    grammars: GrammarThread | None = None
    """What applies grammars at a tail, or None without a library for them."""


@dataclass(frozen=True)
class ModelInfo:
    """Describes a model before any weight is loaded."""

    name: str
    """Name of the model, as given on the command line."""
    folder: Path
    shape: ModelShape
    config_digest: str
    """Digest of the model's config, which names the model in records."""
    hub: HubOptions = HubOptions()
    """Options with which the model was found on the hub."""

    @classmethod
    def find(cls, name: str, revision: str | None = None, progress: Progress | None = None) -> "ModelInfo":
        """Find a model's directory and read its config.  Raises ModelError, also for weights in an unknown format."""
        hub = HubOptions(revision)
        folder = resolve_model(name, hub=hub, progress=progress)
        config = read_config(folder)
        check_format(folder, config)
        return cls(name, folder, read_shape(folder), config_digest(config), hub)


@contextlib.asynccontextmanager
async def load_stage(
    config: NodeConfig,
    model: ModelInfo,
    span: Span,
    counters: Counters | None = None,
    progress: Progress | None = None,
    skeleton: PreTrainedModel | None = None,
) -> AsyncIterator[LoadedStage]:
    """Load, check and measure a span, and run its engine; its memory is freed on exit.

    The engine continues to count in `counters`; `progress` is called while the span loads.  `skeleton` is the model
    without weights, if it has been built.  Raises ModelError, BadRequest.
    """
    with open_offload(find_device(config.device.name), config.device.offload) as offload:
        cancellable = _CancellableProgress(progress)
        try:
            span_model, served, rate, speculator, tap_slice = await asyncio.to_thread(
                _load, config, model, span, offload, cancellable, skeleton
            )
            is_tail = span.end == model.shape.blocks
            grammars = await asyncio.to_thread(load_grammars, model.folder, served.vocab_size) if is_tail else None
            del skeleton
            free_unused_memory()
        except asyncio.CancelledError:
            cancellable.cancelled.set()
            raise
        codec = make_row_codec(config.model.activations, served.hidden_size)
        taps = tap_slice.taps if tap_slice else speculator.taps if speculator else ()
        model_runner = ModelRunner(span_model, Sampler(served.vocab_size), codec, taps, tap_slice)
        runner = _throttled(model_runner, config.device.share)
        profile = await asyncio.to_thread(measure_profile, runner, served, span_model.store)
        cancellable(1, 1, PROVING)
        engine = Engine(runner, config.limits.budget, counters or Counters(), share=config.device.share)
        running = asyncio.create_task(engine.run())
        try:
            yield LoadedStage(
                served, engine, span_model.store, rate, profile, span_model.depends_on_text_alone,
                span_model.loaded.holds_codes, speculator, tap_slice, grammars,
            )  # fmt: skip
        finally:
            running.cancel()
            if grammars is not None:
                grammars.close()
            await asyncio.gather(running, return_exceptions=True)
            del engine, runner, model_runner, span_model, speculator, tap_slice
    free_unused_memory()


def load_grammars(folder: Path, vocab_size: int) -> GrammarThread | None:
    """Return what applies grammars for the model in a directory, or None, with a line in the log, if nothing can."""
    try:
        return GrammarThread(GrammarLoader(folder, vocab_size).load())
    except (BadRequest, ModelError) as error:
        log.warning("this node applies no grammars: %s", error)
        return None


def free_unused_memory() -> None:
    """Return unused memory to the system: modules are reference cycles, and torch and the allocator keep what is freed.

    Loading half of SmolLM2 left some 100 MB in glibc's arenas.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc has it, musl has not
        trim(0)


class _LoadCancelled(BaseException):
    """Ends the loading thread when its result is no longer needed.

    It is not an Exception, because transformers collects those and continues to read.
    """


class _CancellableProgress:
    """Reports progress, and raises _LoadCancelled in the loading thread after the load was cancelled."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.cancelled = threading.Event()

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.cancelled.is_set():
            raise _LoadCancelled
        if self._progress is not None:
            self._progress(done, total, what)


def find_device(name: str, *, is_used: bool = True) -> torch.device:
    """Return the torch device with this name.

    Raises BadRequest if there is no such device, or if it `is_used` and this machine has none.
    """
    try:
        device = torch.device(name)
        if is_used:
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadRequest(
            f"device '{name}' cannot be used here ({str(error).splitlines()[0]}): try --device cpu"
        ) from None
    return device


def node_room(config: NodeConfig, folder: Path) -> NodeRoom:
    """Return the memory that a node may use for the model in a directory, and what it uses it for.

    Raises BadRequest, and ModelError if there is no such speculator.
    """
    device = config.device
    # A dry run may plan for a device of another machine, if its memory is given.
    place = find_device(device.name, is_used=not device.memory)
    memory = device.memory or free_memory(place)
    (speculator, taps), is_automatic = _speculator_bytes(config, folder, place), config.model.speculator == AUTO
    return NodeRoom(
        memory,
        offload_room(device.offload),
        device.kv_tokens,
        config.limits.budget.rows,
        speculator,
        is_automatic,
        taps,
    )


def _speculator_bytes(config: NodeConfig, folder: Path, device: torch.device) -> tuple[int, int]:
    """Return the bytes that the node's speculator needs beside the last block, and its taps without that at most.

    Raises ModelError unless it is auto.
    """
    width: int = getattr(torch, config.model.dtype).itemsize
    computed = 4 if device.type == "cpu" else width
    try:
        found = find_speculator(config.model.speculator, folder, HubOptions(config.model.revision), config.model.name)
        return (0, 0) if found is None else (found.memory_bytes(computed, width), found.tap_bytes(computed))
    except ModelError:
        if config.model.speculator != AUTO:
            raise
        return 0, 0  # loading says why it takes none


def _load(
    config: NodeConfig,
    model: ModelInfo,
    span: Span,
    offload: Offload | None,
    progress: Progress | None,
    skeleton: PreTrainedModel | None = None,
) -> tuple[SpanModel, ServedSpan, float, Speculator | None, TapSlice | None]:
    if config.device.threads:
        torch.set_num_threads(config.device.threads)
    device = find_device(config.device.name)
    check_kind(config.model.quantization, device)
    dtype, kind = getattr(torch, config.model.dtype), config.model.quantization
    skeleton = build_skeleton(model.folder, dtype) if skeleton is None else skeleton
    is_loaded = tensors_to_load(model.folder)
    folder = resolve_model(
        model.name, weights=True, span=span,
        is_loaded=is_loaded, block_of=find_block_of(skeleton), hub=model.hub, progress=progress,
    )  # fmt: skip
    room = node_room(config, folder)
    holding = choose_holding(config, room, folder, skeleton, span)
    is_tail = span.end == model.shape.blocks
    beside = room_for_speculator(room, holding.footprint, model.shape.blocks) if is_tail else room.taps
    ends = holding.footprint.ends.of(span, model.shape.blocks) + beside
    peak = peak_bytes(len(span), room, holding.footprint, ends)
    log.info("blocks %s need at most %s on %s, beside the program", span, format_bytes(peak), device.type)
    loaded = load_span(
        folder, span, dtype, device, progress,
        quantization=kind, offload=offload, skeleton=skeleton, holds_codes=holding.holds_codes,
        matched=holding.matched,
    )  # fmt: skip
    free_unused_memory()
    weights = weights_digest(folder, read_config(folder), progress, is_loaded)
    if progress is not None:
        progress(0, 0, PROVING)
    span_model = SpanModel(loaded, config.device.kv_tokens)
    if offload is None:  # offloaded weights keep the layout in which they were stored
        choose_layouts(span_model.linears())
        pack_products(span_model.layers)
    check_family(span_model)
    check_weights(span_model)
    check_kernels(span_model)
    choose_attention(span_model, config.device.attention)
    fuse_blocks(span_model)
    numerics = NumericsClass(weights, config.model.dtype, config.model.quantization, config.model.activations)
    served = ServedSpan(
        span=span,
        blocks=model.shape.blocks,
        vocab_size=model.shape.vocab_size,
        hidden_size=model.shape.hidden_size,
        max_positions=model.shape.max_positions,
        config=model.config_digest,
        numerics=numerics,
        attention=span_model.attention_name,
        activation_bytes=numerics.row_bytes(model.shape.hidden_size),
    )
    gives_way = is_tail and room.speculator and not beside
    if gives_way:
        log.info("the speculator is left out: the last block would not fit beside it")
    choice = NONE if gives_way else config.model.speculator
    speculator = load_speculator(choice, span_model, folder, served, model.name, model.hub, progress)
    tap_slice = load_tap_slice(choice, span_model, folder, served, speculator, model.name, model.hub)
    return span_model, served, measure_rate(span_model) * config.device.share, speculator, tap_slice


def _throttled(runner: Runner, share: float) -> Runner:
    """Return a runner that uses the device for the share of the time that the owner allows."""
    return ThrottledRunner(runner, share) if share < 1.0 else runner


def measure_rate(model: SpanModel) -> float:
    """Return the block-rows per second of this span: the median of some forwards, after one to warm up."""
    rows = min(RATE_ROWS, model.store.free_tokens // 2)
    span = model.loaded.span
    times = []
    for _ in range(RATE_RUNS + 1):
        session = NodeSession(SessionTerms(0, rows, 1, 0, model.loaded.config.vocab_size, 0, Resumption(rows, rows)))
        kv = model.store.open(rows, 1)
        try:
            start = time.perf_counter()
            for append in replay(0, [0] * rows):
                (step,) = session.receive(append)
                hidden = torch.zeros(step.rows, model.hidden_size, dtype=model.dtype, device=model.device)
                model.forward([Segment(kv, step, span)], hidden)[-1].float().cpu()
            times.append(time.perf_counter() - start)
        finally:
            kv.close()
    return rows * len(span) / statistics.median(times[1:])
