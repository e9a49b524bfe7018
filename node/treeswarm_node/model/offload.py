"""Weights that wait elsewhere: each block's are streamed to the device while the block before it computes.

Two slots on the device, each as large as the largest block.  The numbers are the same as without: what a block computes
with is a copy of what was loaded.  A block's weights lie in one piece, in host memory (pinned, for a GPU) or in a file
without a name, which ends with the process.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import IO, cast

import torch

from treeswarm.errors import BadRequest, ModelError

# Every tensor begins at a multiple of this: what vector loads and any dtype want.
ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class _Piece:
    """One tensor of a block: what layers look at, and where its bytes are."""

    tensor: torch.Tensor
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def in_slot(self, slot: torch.Tensor) -> torch.Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return slot[self.offset : self.offset + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True, eq=False)
class _Block:
    pieces: list[_Piece]
    size: int
    store: torch.Tensor | int
    """Host memory, or where in the file it begins."""


@dataclass(eq=False)
class _Slot:
    memory: torch.Tensor
    staging: torch.Tensor
    """Where a file is read to; the slot itself on a CPU."""
    holds: int | None = None
    filling: "Future[torch.cuda.Event | None] | None" = None


@dataclass(eq=False)
class Offload:
    """`store_layer` every block in order, then `load_block` those that are to run, from one thread."""

    device: torch.device
    where: str
    """`ram` or `disk`."""
    folder: Path = field(default_factory=lambda: Path(gettempdir()))
    """For the file."""
    _blocks: list[_Block] = field(default_factory=list)
    _slots: list[_Slot] = field(default_factory=list)
    _views: list[list[list[torch.Tensor]]] = field(default_factory=list)
    _file: IO[bytes] | None = None
    _side: "torch.cuda.Stream | None" = None
    _reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="weights"))

    def __post_init__(self) -> None:
        if self.where == "ram" and self.device.type == "cpu":
            raise BadRequest("--offload ram is for accelerators, on a CPU weights are in RAM: use --offload disk")
        if self.device.type not in {"cpu", "cuda"}:
            raise BadRequest(f"--offload does not know device '{self.device}': use cpu or cuda")
        if self.where == "disk":
            self._file = TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  # `close` closes it
        if self.device.type == "cuda":
            self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def store_layer(self, layer: torch.nn.Module) -> None:
        """Put the layer's weights away: until it is placed, it has none.  Raises ModelError when the disk is full."""
        assert not self._slots
        pieces, size = [], 0
        for tensor in _tensors(layer):
            pieces.append(_Piece(tensor, size, tensor.shape, tensor.dtype))
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        packed = torch.zeros(size, dtype=torch.uint8, pin_memory=self._side is not None)
        for piece in pieces:
            piece.in_slot(packed).copy_(piece.tensor)
            piece.tensor.data = torch.empty(0, dtype=piece.dtype, device=self.device)
        self._blocks.append(_Block(pieces, size, packed if self._file is None else self._write(packed)))

    def load_block(self, block: int) -> None:
        """Give the `block`-th taken layer its weights, and start to fetch the next one's."""
        slots = self._ready_slots()
        at = next((i for i, slot in enumerate(slots) if slot.holds == block), None)
        if at is None:
            at = 0
            self._fetch(slots[at], block)
        filling = slots[at].filling
        copied = filling.result() if filling is not None else None
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
        for piece, view in zip(self._blocks[block].pieces, self._views[at][block], strict=True):
            piece.tensor.data = view
        following, other = (block + 1) % len(self._blocks), slots[1 - at]
        if following not in {slot.holds for slot in slots}:
            self._fetch(other, following)

    def close(self) -> None:
        """Let go of the file and the memory."""
        self._reader.shutdown(wait=True)
        if self._file is not None:
            self._file.close()
        self._blocks, self._slots, self._views = [], [], []

    def _ready_slots(self) -> list[_Slot]:
        if not self._slots:
            most = max(block.size for block in self._blocks)
            with torch.inference_mode(mode=False):
                for _ in range(2):
                    memory = torch.empty(most, dtype=torch.uint8, device=self.device)
                    staged = self._side is not None and self._file is not None
                    staging = torch.empty(most, dtype=torch.uint8, pin_memory=True) if staged else memory
                    self._slots.append(_Slot(memory, staging))
                    self._views.append([[p.in_slot(memory) for p in block.pieces] for block in self._blocks])
        return self._slots

    def _fetch(self, slot: _Slot, block: int) -> None:
        """In the reader's thread; what the device still computes from the slot comes first."""
        free = torch.cuda.current_stream(self.device).record_event() if self._side is not None else None
        slot.holds = block
        slot.filling = self._reader.submit(self._fill, slot, self._blocks[block], free)

    def _fill(self, slot: _Slot, block: _Block, free: "torch.cuda.Event | None") -> "torch.cuda.Event | None":
        source = block.store
        if isinstance(source, int):
            if slot.filling is not None and self._side is not None:
                self._side.synchronize()  # the staging memory's last copy is over
            self._read(source, slot.staging[: block.size])
            source = slot.staging[: block.size]
        if self._side is None:
            return None
        assert free is not None
        with torch.cuda.stream(self._side):
            self._side.wait_event(free)
            slot.memory[: block.size].copy_(source, non_blocking=True)
            copied: torch.cuda.Event = self._side.record_event()
            return copied

    def _write(self, packed: torch.Tensor) -> int:
        assert self._file is not None
        begin = self._file.seek(0, 2)
        left = memoryview(cast(bytes, packed.numpy()))
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise ModelError(f"no room for offloaded weights in {self.folder} ({error.strerror}): free some") from None
        return begin

    def _read(self, begin: int, into: torch.Tensor) -> None:
        assert self._file is not None
        self._file.seek(begin)
        left = memoryview(cast(bytes, into.numpy()))
        while left:
            count = self._file.readinto(left)  # type: ignore[attr-defined]
            if not count:
                raise ModelError("the file of offloaded weights ended early: start this node again")
            left = left[count:]


@contextlib.contextmanager
def open_offload(device: torch.device, where: str) -> Iterator[Offload | None]:
    """None for `none`."""
    if where == "none":
        yield None
        return
    offload = Offload(device, where)
    with contextlib.closing(offload):
        yield offload


def _tensors(layer: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Whatever the layer's parameters and buffers are, each once."""
    seen: set[int] = set()
    for tensor in (*layer.parameters(), *layer.buffers()):
        if id(tensor) not in seen and tensor.numel():
            seen.add(id(tensor))
            yield tensor
