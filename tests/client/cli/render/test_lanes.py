"""Plain decoding and trees are seen writing: as two columns on a terminal, as lines of figures elsewhere."""

import io

from rich.console import Console

from treeswarm_client.cli.render.lanes import LaneDisplay
from treeswarm_client.generation.comparison import Lane, LaneName
from treeswarm_client.generation.run import Run, Token
from treeswarm_client.generation.stats import StatsRecorder


async def _no_tokens():  # type: ignore[no-untyped-def]
    return
    yield


class Screen:
    """A console that keeps what is written, and two lanes that write on it."""

    def __init__(self, *, terminal: bool, width: int = 100, height: int = 20) -> None:
        self.file = io.StringIO()
        self.console = Console(
            file=self.file, force_terminal=terminal, width=width, height=height, color_system=None, legacy_windows=False
        )
        self.display = LaneDisplay(self.console, "def [bold](")
        self.lanes: dict[LaneName, Lane] = {
            name: Lane(name, Run(_no_tokens(), [1], recorder=StatsRecorder())) for name in ("plain", "trees")
        }

    def write(self, name: LaneName, *texts: str, seconds: float) -> None:
        """Let a lane write tokens that came in one round trip."""
        lane = self.lanes[name]
        lane.seconds += seconds
        lane.run.recorder.add_traversal(seconds, ())
        for text in texts:
            lane.run.recorder.committed += 1
            lane.run.token_ids.append(0)
            lane.run.text += text
            self.display.on_token(lane, Token(0, text, 0.0, lane.run.recorder.traversals))

    def columns(self) -> str:
        with self.console.capture() as capture:
            self.console.print(self.display.columns())
        return capture.get()


def test_columns_show_both_lanes_with_their_rates() -> None:
    screen = Screen(terminal=True)
    with screen.display.live():
        screen.write("plain", "a", seconds=0.5)
        screen.write("trees", "a", "b", "c", "d", seconds=0.5)
        shown = screen.columns()
    assert "2.0 tokens/s" in shown
    assert "8.0 tokens/s" in shown
    assert "1 tokens in 1 round trip, 0.5 s" in shown
    assert "4 tokens in 1 round trip, 0.5 s" in shown
    left, right = next(line for line in shown.splitlines() if "[bold]" in line).split("def [bold](")[1:]
    assert (left.strip(), right.strip()) == ("a", "abcd")


def test_a_long_text_shows_its_last_lines() -> None:
    screen = Screen(terminal=True, height=12)
    with screen.display.live():
        screen.write("plain", *(f"{i}\n" for i in range(30)), seconds=1.0)
        screen.write("trees", "x", seconds=1.0)
        shown = screen.columns()
    assert "29" in shown
    assert "\n10" not in shown
    assert len(shown.splitlines()) <= 12


def test_the_text_of_a_node_cannot_control_the_terminal() -> None:
    screen = Screen(terminal=True)
    with screen.display.live():
        screen.write("trees", "\x1b]0;title\x07", seconds=1.0)
        assert "\x1b]0" not in screen.columns()


def test_without_a_terminal_figures_come_as_lines() -> None:
    screen = Screen(terminal=False)
    with screen.display.live():
        for _ in range(2):
            for _ in range(8):
                screen.write("plain", "a", seconds=0.25)
            screen.write("trees", *"aaaaaaaa", seconds=0.5)
    screen.display.print_text(screen.lanes["trees"])
    lines = screen.file.getvalue().splitlines()
    assert lines[:2] == [
        "    8 tokens: plain decoding 4.0 tokens/s (8 round trips, 2.0 s); trees 16.0 tokens/s (1 round trip, 0.5 s)",
        "   16 tokens: plain decoding 4.0 tokens/s (16 round trips, 4.0 s); trees 16.0 tokens/s (2 round trips, 1.0 s)",
    ]
    assert lines[2] == f"def [bold]({'a' * 16}"


def test_a_narrow_terminal_gets_lines() -> None:
    screen = Screen(terminal=True, width=50)
    with screen.display.live():
        screen.write("plain", *"aaaaaaaa", seconds=1.0)
        screen.write("trees", *"aaaaaaaa", seconds=1.0)
    assert "8 tokens: plain" in screen.file.getvalue()
