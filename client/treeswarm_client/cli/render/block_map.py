"""Blocks as columns, nodes as rows: where a model is served, and where it is not.  Pure."""

from dataclasses import dataclass

from rich.text import Text

from treeswarm.protocol.records import NodeState
from treeswarm_client.discovery.overview import ClassView, NodeView

SHORT_ID = 8
# Wider would only move the eye further.
WIDEST_CELL = 4
GAP, MANY = "!", "+"
SILENT = "no answer"
# Every state has a letter of its own, so that the picture reads without colours.
LETTERS = {"online": "█", "joining": "j", "draining": "d", "paused": "p", SILENT: "?"}
STYLES = {"online": "green", "joining": "cyan", "draining": "yellow", "paused": "blue", SILENT: "red"}
ASCII_ONLINE = "#"


@dataclass(frozen=True)
class Scale:
    """How blocks fall into columns: several characters a block, or several blocks a character."""

    blocks: int
    columns: int
    cell: int

    @classmethod
    def fit(cls, blocks: int, width: int) -> "Scale":
        """For at most `width` characters, which are at least one."""
        return cls(blocks, min(blocks, width), max(1, min(WIDEST_CELL, width // blocks)))

    def column(self, index: int) -> range:
        """The blocks in it, at least one."""
        return range(index * self.blocks // self.columns, (index + 1) * self.blocks // self.columns)


def node_condition(node: NodeView) -> str:
    """In a word: its state, or that it does not answer whatever it says."""
    return SILENT if node.silent and node.state is NodeState.ONLINE else node.state.value


def draw_block_map(served: ClassView, width: int, *, ascii_only: bool = False) -> list[Text]:
    """Lines of at most `width` characters, which are at least four: block numbers, nodes, replicas, the legend."""
    label = min(SHORT_ID, width // 3)
    scale = Scale.fit(served.blocks, width - label - 1)
    return [
        _line("blocks", Text(_ruler(scale), "dim"), label),
        *(_line(node.id, _bar(node, scale, ascii_only=ascii_only), label) for node in served.nodes),
        _line("replicas", _replicas(served, scale), label),
        *_legend(served, scale, width, ascii_only=ascii_only),
    ]


def _line(name: str, drawn: Text, label: int) -> Text:
    return Text.assemble((name[:label].ljust(label) + " ", "dim"), drawn)


def _ruler(scale: Scale) -> str:
    """Block numbers above where they begin, as many as can be told apart."""
    per_block = scale.columns * scale.cell / scale.blocks
    step = 1
    while step * per_block < len(str(scale.blocks)) + 1:
        step *= 2
    ruler, total = "", scale.columns * scale.cell
    for block in range(0, scale.blocks, step):
        ruler = ruler.ljust(int(block * per_block)) + str(block)
    return ruler if len(ruler) <= total else ruler[:total].rpartition(" ")[0]


def _bar(node: NodeView, scale: Scale, *, ascii_only: bool) -> Text:
    letter = _letter(node_condition(node), ascii_only=ascii_only)
    columns = (scale.column(index) for index in range(scale.columns))
    drawn = (letter if node.span.start < column.stop and column.start < node.span.end else " " for column in columns)
    return Text("".join(mark * scale.cell for mark in drawn).rstrip(), STYLES[node_condition(node)])


def _replicas(served: ClassView, scale: Scale) -> Text:
    """The fewest of each column's blocks: a gap is never scaled away."""
    made = Text()
    for index in range(scale.columns):
        column = scale.column(index)
        fewest = min(served.replicas[column.start : column.stop])
        if not fewest:
            made.append(GAP * scale.cell, "bold red")
        else:
            count = str(fewest) if fewest < 10 else MANY
            made.append(count.ljust(scale.cell), "yellow" if fewest == 1 else "green")
    made.rstrip()
    return made


def _legend(served: ClassView, scale: Scale, width: int, *, ascii_only: bool) -> list[Text]:
    """Of the marks that are there; words that do not fit go to a line of their own."""
    seen = {node_condition(node) for node in served.nodes}
    words = [f"{_letter(name, ascii_only=ascii_only)} {name}" for name in LETTERS if name in seen]
    words += [f"{GAP} nobody"] if served.gaps else []
    words += [f"{MANY} ten or more"] if max(served.replicas) >= 10 else []
    words += [f"a column is {_share(scale)} blocks"] if scale.columns < scale.blocks else []
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 3 + len(word) > width:
            lines.append("")
        lines[-1] += f"   {word}" if lines[-1] else word
    return [Text(line[:width], "dim") for line in lines if line]


def _share(scale: Scale) -> str:
    low, high = scale.blocks // scale.columns, -(-scale.blocks // scale.columns)
    return str(low) if low == high else f"{low} or {high}"


def _letter(name: str, *, ascii_only: bool) -> str:
    return ASCII_ONLINE if ascii_only and name == "online" else LETTERS[name]
