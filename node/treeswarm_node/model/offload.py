"""Offload weights: each block's weights are loaded to the device while the block before it computes.

The device has two slots, each as large as the largest block.  The results are the same as without offloading, because a
block computes with a copy of the weights that were loaded.  A block's weights are stored in one piece: in host memory
(pinned, for a GPU), or in an unlinked temporary file, which is deleted when the process ends.
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

# Bytes that every tensor's offset is a multiple of, as vector loads and any dtype require.
ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class _StoredTensor:
    """Locates one tensor's bytes within a block."""

    tensor: torch.Tensor
    """The parameter or buffer that the layer uses."""
    offset: int
    """Offset of its bytes in the block."""
    shape: torch.Size
    dtype: torch.dtype

    def view_in(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the tensor's view of a block's bytes, uint8 [bytes]."""
        size = self.shape.numel() * self.dtype.itemsize
        return memory[self.offset : self.offset + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True, eq=False)
class _Block:
    tensors: list[_StoredTensor]
    size: int
    """Number of bytes."""
    store: torch.Tensor | int
    """Bytes in host memory, or the block's offset in the file."""


@dataclass(eq=False)
class _Slot:
    memory: torch.Tensor
    """Memory of the device for one block, uint8 [bytes]."""
    staging: torch.Tensor
    """Host memory that the file is read into; on a CPU it is `memory`."""
    holds: int | None = None
    """Index of the block that is in the slot or being loaded into it."""
    loading: "Future[torch.cuda.Event | None] | None" = None
    """The load of that block, which returns the event of its copy on a GPU."""


@dataclass(eq=False)
class Offload:
    """Stores the weights of a span's blocks and loads them when they are needed.

    Call `store_layer` for every block in order, then `load_block` for those that are to run, all from one thread.
    """

    device: torch.device
    location: str
    """Where the weights are stored: `ram` or `disk`."""
    folder: Path = field(default_factory=lambda: Path(gettempdir()))
    """Directory of the file."""
    _blocks: list[_Block] = field(default_factory=list)
    _slots: list[_Slot] = field(default_factory=list)
    _views: list[list[list[torch.Tensor]]] = field(default_factory=list)
    """Views of the slots' memory, by slot, block and tensor."""
    _file: IO[bytes] | None = None
    _copy_stream: "torch.cuda.Stream | None" = None
    """Stream of the copies to a GPU; None on a CPU."""
    _reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="weights"))

    def __post_init__(self) -> None:
        if self.location == "ram" and self.device.type == "cpu":
            raise BadRequest(
                "--offload ram needs an accelerator, because a CPU's weights are in RAM: use --offload disk"
            )
        if self.device.type not in {"cpu", "cuda"}:
            raise BadRequest(f"--offload does not support device '{self.device}': use cpu or cuda")
        if self.location == "disk":
            self._file = TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  # `close` closes it
        if self.device.type == "cuda":
            self._copy_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def store_layer(self, layer: torch.nn.Module) -> None:
        """Store the layer's weights and remove them from the layer until `load_block` is called.

        Raises ModelError if the disk is full.
        """
        assert not self._slots
        tensors, size = [], 0
        for tensor in _weights_of(layer):
            tensors.append(_StoredTensor(tensor, size, tensor.shape, tensor.dtype))
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        block = torch.zeros(size, dtype=torch.uint8, pin_memory=self._copy_stream is not None)
        for stored in tensors:
            stored.view_in(block).copy_(stored.tensor)
            stored.tensor.data = torch.empty(0, dtype=stored.dtype, device=self.device)
        self._blocks.append(_Block(tensors, size, block if self._file is None else self._write(block)))

    def load_block(self, block: int) -> None:
        """Load the weights of the `block`-th stored layer, and start to load those of the next one."""
        slots = self._ready_slots()
        current = next((i for i, slot in enumerate(slots) if slot.holds == block), None)
        if current is None:
            current = 0
            self._start_loading(slots[current], block)
        loading = slots[current].loading
        copied = loading.result() if loading is not None else None
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
        for stored, view in zip(self._blocks[block].tensors, self._views[current][block], strict=True):
            stored.tensor.data = view
        following, other = (block + 1) % len(self._blocks), slots[1 - current]
        if following not in {slot.holds for slot in slots}:
            self._start_loading(other, following)

    def close(self) -> None:
        """Close the file and free the memory."""
        self._reader.shutdown(wait=True)
        if self._file is not None:
            self._file.close()
        self._blocks, self._slots, self._views = [], [], []

    def _ready_slots(self) -> list[_Slot]:
        if not self._slots:
            largest = max(block.size for block in self._blocks)
            with torch.inference_mode(mode=False):
                for _ in range(2):
                    memory = torch.empty(largest, dtype=torch.uint8, device=self.device)
                    is_staged = self._copy_stream is not None and self._file is not None
                    staging = torch.empty(largest, dtype=torch.uint8, pin_memory=True) if is_staged else memory
                    self._slots.append(_Slot(memory, staging))
                    self._views.append([[t.view_in(memory) for t in block.tensors] for block in self._blocks])
        return self._slots

    def _start_loading(self, slot: _Slot, block: int) -> None:
        """Load a block in the reader's thread, after what the device still computes from the slot."""
        free = torch.cuda.current_stream(self.device).record_event() if self._copy_stream is not None else None
        slot.holds = block
        slot.loading = self._reader.submit(self._load, slot, self._blocks[block], free)

    def _load(self, slot: _Slot, block: _Block, free: "torch.cuda.Event | None") -> "torch.cuda.Event | None":
        source = block.store
        if isinstance(source, int):
            if slot.loading is not None and self._copy_stream is not None:
                self._copy_stream.synchronize()  # the last copy from the staging memory must be over
            self._read(source, slot.staging[: block.size])
            source = slot.staging[: block.size]
        if self._copy_stream is None:
            return None
        assert free is not None
        with torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(free)
            slot.memory[: block.size].copy_(source, non_blocking=True)
            copied: torch.cuda.Event = self._copy_stream.record_event()
            return copied

    def _write(self, block: torch.Tensor) -> int:
        assert self._file is not None
        start = self._file.seek(0, 2)
        remaining = memoryview(cast(bytes, block.numpy()))
        try:
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
        except OSError as error:
            raise ModelError(
                f"offloaded weights cannot be written to {self.folder} ({error.strerror}): free some space there"
            ) from None
        return start

    def _read(self, start: int, target: torch.Tensor) -> None:
        assert self._file is not None
        self._file.seek(start)
        remaining = memoryview(cast(bytes, target.numpy()))
        while remaining:
            count = self._file.readinto(remaining)  # type: ignore[attr-defined]
            if not count:
                raise ModelError("the file of offloaded weights ended early: restart this node")
            remaining = remaining[count:]


@contextlib.contextmanager
def open_offload(device: torch.device, location: str) -> Iterator[Offload | None]:
    """Open an offload for the location `ram` or `disk`, and close it on exit; yields None for `none`."""
    if location == "none":
        yield None
        return
    offload = Offload(device, location)
    with contextlib.closing(offload):
        yield offload


def _weights_of(layer: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield the layer's parameters and buffers that are not empty, each once."""
    seen: set[int] = set()
    for tensor in (*layer.parameters(), *layer.buffers()):
        if id(tensor) not in seen and tensor.numel():
            seen.add(id(tensor))
            yield tensor
