"""Shows plain decoding and trees writing the same text: two live columns on a terminal, lines of figures elsewhere."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from treeswarm_client.cli.render.live import COLOURS, escape_controls
from treeswarm_client.cli.render.steps import can_redraw
from treeswarm_client.generation.comparison import Lane, LaneName
from treeswarm_client.generation.run import Token

# Two columns of code that is still readable.
LEAST_WIDTH = 60
# Lines of the screen that the text leaves free: headings, counters, and what stands above.
OTHER_LINES = 8
GAP = 2
# Without a terminal that can be redrawn, a line is written whenever both lanes have so many tokens more.
LINE_TOKENS = 8
HEADINGS: dict[LaneName, str] = {"plain": "plain decoding", "trees": "trees"}


@dataclass(eq=False)
class LaneDisplay:
    """Receives the tokens of both lanes, and shows them and the lanes' figures while `live` lasts."""

    console: Console
    prompt: str
    _texts: dict[LaneName, Text] = field(default_factory=dict)
    _lanes: dict[LaneName, Lane] = field(default_factory=dict)
    _next_line: int = LINE_TOKENS

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Show the lanes within the context."""
        self._texts = {name: Text(escape_controls(self.prompt), style="dim") for name in HEADINGS}
        if not self._has_columns:
            yield
            return
        with Live(get_renderable=self.columns, console=self.console, refresh_per_second=12, transient=True):
            yield

    def on_token(self, lane: Lane, token: Token) -> None:
        """Take one token of a lane."""
        self._lanes[lane.name] = lane
        self._texts[lane.name].append(escape_controls(token.text), COLOURS[token.traversal % len(COLOURS)])
        if not self._has_columns and self._tokens_of_both() >= self._next_line:
            self._next_line = self._tokens_of_both() // LINE_TOKENS * LINE_TOKENS + LINE_TOKENS
            figures = "; ".join(f"{HEADINGS[name]} {_rate(lane)} ({_cost(lane)})" for name, lane in self._in_order())
            self.console.print(f"  {self._tokens_of_both():>3} tokens: {figures}", soft_wrap=True)

    def columns(self) -> Table:
        """Return both lanes side by side: headings, figures, and as many last lines of the text as fit."""
        table = Table.grid(expand=True, padding=(0, GAP, 0, 0))
        for _ in HEADINGS:
            table.add_column(ratio=1)
        table.add_row(*(Text(heading, style="bold") for heading in HEADINGS.values()))
        table.add_row(*(_figures(self._lanes.get(name)) for name in HEADINGS))
        table.add_row(*(self._last_lines(self._texts[name]) for name in HEADINGS))
        return table

    def print_text(self, lane: Lane) -> None:
        """Print the whole text of a lane, with its colours, below its prompt."""
        if self.console.is_terminal:
            self.console.print(self._texts[lane.name], soft_wrap=True)
        else:
            self.console.print(f"{self.prompt}{lane.run.text}", markup=False, soft_wrap=True)
        self.console.print()

    @property
    def _has_columns(self) -> bool:
        return can_redraw(self.console) and self.console.width >= LEAST_WIDTH

    def _tokens_of_both(self) -> int:
        return min((self._lanes[name].tokens if name in self._lanes else 0) for name in HEADINGS)

    def _in_order(self) -> list[tuple[LaneName, Lane]]:
        return [(name, self._lanes[name]) for name in HEADINGS]

    def _last_lines(self, text: Text) -> Text:
        lines = text.wrap(self.console, self.console.width // len(HEADINGS) - GAP)
        return Text("\n").join(lines[-max(1, self.console.height - OTHER_LINES) :])


def _figures(lane: Lane | None) -> str:
    return "\n" if lane is None else f"{_rate(lane)}\n{lane.tokens} tokens in {_cost(lane)}"


def _rate(lane: Lane) -> str:
    return f"{lane.stats.tokens_per_second:.1f} tokens/s"


def _cost(lane: Lane) -> str:
    trips = lane.stats.traversals
    return f"{trips} round trip{'' if trips == 1 else 's'}, {lane.seconds:.1f} s"
