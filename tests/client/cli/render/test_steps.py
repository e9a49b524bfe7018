"""A long step is seen to run, on a terminal and elsewhere."""

import asyncio
import io

import pytest
from rich.console import Console

from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.cli.render.steps import show_step


def show(seconds: float, *, terminal: bool, fails: bool = False, quiet: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=60, color_system=None, quiet=quiet)

    async def work() -> None:
        async with show_step(console, "1/3 starting [three]") as rename:
            await asyncio.sleep(seconds)
            rename("1/3 nearly")
            if fails:
                raise ValueError

    try:
        run_virtually(work())
    except ValueError:
        file.write("failed")
    return file.getvalue()


@pytest.mark.parametrize(("seconds", "dots"), [(0.5, 1), (5.5, 6), (61.5, 62)])
def test_without_a_terminal_a_dot_comes_every_second(seconds: float, dots: int) -> None:
    assert show(seconds, terminal=False) == f"1/3 starting [three] {'.' * dots} {seconds:.0f} s\n"


def test_a_quiet_console_shows_nothing() -> None:
    assert show(1.5, terminal=False, quiet=True) == ""


def test_a_failed_step_ends_its_line() -> None:
    assert show(1.5, terminal=False, fails=True) == "1/3 starting [three] .. 2 s\nfailed"


def test_a_terminal_shows_a_spinner_and_the_time() -> None:
    shown = show(1.5, terminal=True)
    assert "1/3 starting [three]" in shown
    assert "0:00:00" in shown
    assert "nearly" in shown
