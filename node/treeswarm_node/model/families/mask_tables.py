"""Handle attention modules that keep a causal mask as a table of their own (GPT-Neo), beside the mask they are given.

Such a table marks rows by their place in a call, which is not their place in a tree.  A node therefore runs these
modules with tables that hide nothing, and puts their windows into the masks that it gives.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch

NAME = "bias"
"""Name of the buffer with the table, bool [1, 1, positions, positions]: what is True is seen."""


def tables_of(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules of a block that have such a table."""
    return [module for module in layer.modules() if _is_table(module._buffers.get(NAME))]


def _is_table(buffer: torch.Tensor | None) -> bool:
    return buffer is not None and buffer.dtype == torch.bool and buffer.ndim == 4 and buffer.shape[:2] == (1, 1)


def window_of(layer: torch.nn.Module) -> int | None:
    """Return the number of positions that the last row of a block's table sees, or None if it sees all of them."""
    for module in tables_of(layer):
        last = module.get_buffer(NAME)[0, 0, -1]
        seen = int(last.sum())
        return seen if seen < len(last) else None
    return None


@contextlib.contextmanager
def without_tables(layer: torch.nn.Module) -> Iterator[None]:
    """Let the tables of a block hide nothing in this context."""
    with _replaced(tables_of(layer), lambda table: table.new_ones(()).expand(1, 1, 2**31, 2**31)):
        yield


@contextlib.contextmanager
def short_tables(layers: Iterable[torch.nn.Module], window: int) -> Iterator[None]:
    """Reduce the windows of blocks' tables to at most `window` positions in this context; others stay as they are."""
    windowed = [module for layer in layers if window_of(layer) is not None for module in tables_of(layer)]
    with _replaced(windowed, lambda table: table & table.new_ones(table.shape).triu(1 - window)):
        yield


@contextlib.contextmanager
def _replaced(modules: list[torch.nn.Module], change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    before = [(module, module.get_buffer(NAME)) for module in modules]
    for module, table in before:
        module._buffers[NAME] = change(table)
    try:
        yield
    finally:
        for module, table in before:
            module._buffers[NAME] = table
