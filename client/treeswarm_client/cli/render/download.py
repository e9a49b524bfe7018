"""Show on standard error how far a model's download is: as a bar on a terminal, else as a line when it begins."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from treeswarm.programs.units import format_bytes
from treeswarm.progress import Progress
from treeswarm_client.cli.render.steps import can_redraw


@contextlib.contextmanager
def show_download(model: str, console: Console | None = None) -> Iterator[Progress]:
    """Yield a `Progress` that shows nothing unless something is reported to it."""
    console = console or Console(stderr=True, highlight=False)
    if can_redraw(console):
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
        with contextlib.ExitStack() as stack:
            bars = Bars(*columns, console=console, transient=True)
            tasks: dict[str, TaskID] = {}

            def draw(done: int, total: int, what: str) -> None:
                if not tasks:
                    stack.enter_context(bars)
                if what not in tasks:
                    for earlier in tasks.values():
                        bars.remove_task(earlier)
                    tasks.clear()
                    tasks[what] = bars.add_task(f"{model}: {what}", total=total or None)
                bars.update(tasks[what], completed=done)

            yield draw
        return
    shown: set[str] = set()

    def write(done: int, total: int, what: str) -> None:
        if what not in shown:
            shown.add(what)
            size = f" {format_bytes(total)}" if total else ""
            console.print(f"{model}: {what}{size} …", markup=False, soft_wrap=True)

    yield write
