"""Shows that a long step runs, and for how long: a spinner on a terminal, a growing line of dots elsewhere."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from treeswarm.tasks import cancelled

DOT_EVERY_S = 1.0

Rename = Callable[[str], None]


def can_redraw(console: Console) -> bool:
    """Return whether lines on this console can be changed after they were written."""
    return console.is_terminal and not console.is_dumb_terminal


@contextlib.asynccontextmanager
async def show_step(console: Console, text: str) -> AsyncIterator[Rename]:
    """Show within the context that the step runs; yield a function that changes its text on a terminal."""
    if can_redraw(console):
        with spinner(console, text) as rename:
            yield rename
        return
    if console.quiet:  # what is written to its file directly would be seen all the same
        yield lambda _: None
        return
    console.file.write(f"{text} ")
    clock = asyncio.get_running_loop().time
    start = clock()
    dots = asyncio.create_task(_write_dots(console))
    try:
        yield lambda _: None
    finally:
        await cancelled(dots)
        console.file.write(f" {clock() - start:.0f} s\n")
        console.file.flush()


@contextlib.contextmanager
def spinner(console: Console, text: str) -> Iterator[Rename]:
    """Show a spinner, the text and the time within the context; yield a function that changes the text."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda text: progress.update(task, description=text)


async def _write_dots(console: Console) -> None:
    while True:
        console.file.write(".")
        console.file.flush()
        await asyncio.sleep(DOT_EVERY_S)
