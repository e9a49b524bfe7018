"""Draws a map with blocks as columns and nodes as rows: where a model is served, and where it is not.  Pure."""

from dataclasses import dataclass

from rich.text import Text

from treeswarm.protocol.records import NodeState
from treeswarm_client.discovery.overview import ClassView, NodeView

SHORT_ID = 8
# Number of characters of a block: more would only spread the map.
WIDEST_CELL = 4
GAP, MANY = "!", "+"
SILENT = "no answer"
# Every state has a letter of its own, so that the map is readable without colours.
LETTERS = {"online": "█", "joining": "j", "draining": "d", "paused": "p", SILENT: "?"}
STYLES = {"online": "green", "joining": "cyan", "draining": "yellow", "paused": "blue", SILENT: "red"}
ASCII_ONLINE = "#"


@dataclass(frozen=True)
class Scale:
    """The division of blocks into columns: several characters per block, or several blocks per character."""

    blocks: int
    columns: int
    cell: int
    """Number of characters of a column."""

    @classmethod
    def fit(cls, blocks: int, width: int) -> "Scale":
        """Return the widest scale for at most `width` characters; `width` is at least 1."""
        return cls(blocks, min(blocks, width), max(1, min(WIDEST_CELL, width // blocks)))

    def column(self, index: int) -> range:
        """Return the blocks of a column, at least one."""
        return range(index * self.blocks // self.columns, (index + 1) * self.blocks // self.columns)


def node_condition(node: NodeView) -> str:
    """Return a node's state in a word; a node that announces itself online and does not answer has one of its own."""
    return SILENT if node.silent and node.state is NodeState.ONLINE else node.state.value


def draw_block_map(served: ClassView, width: int, *, ascii_only: bool = False) -> list[Text]:
    """Return lines of at most `width` characters: block numbers, nodes, replicas, legend.  `width` is at least 4."""
    label = min(SHORT_ID, width // 3)
    scale = Scale.fit(served.blocks, width - label - 1)
    return [
        _line("blocks", Text(_ruler(scale), "dim"), label),
        *(_line(node.id, _bar(node, scale, ascii_only=ascii_only), label) for node in served.nodes),
        _line("replicas", _replicas(served, scale), label),
        *_legend(served, scale, width, ascii_only=ascii_only),
    ]


def _line(name: str, content: Text, label: int) -> Text:
    return Text.assemble((name[:label].ljust(label) + " ", "dim"), content)


def _ruler(scale: Scale) -> str:
    """Return block numbers above the columns where the blocks begin, as many as have space between them."""
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
    marks = (letter if node.span.start < column.stop and column.start < node.span.end else " " for column in columns)
    return Text("".join(mark * scale.cell for mark in marks).rstrip(), STYLES[node_condition(node)])


def _replicas(served: ClassView, scale: Scale) -> Text:
    """Return the fewest replicas among each column's blocks, so that no gap is scaled away."""
    text = Text()
    for index in range(scale.columns):
        column = scale.column(index)
        fewest = min(served.replicas[column.start : column.stop])
        if not fewest:
            text.append(GAP * scale.cell, "bold red")
        else:
            count = str(fewest) if fewest < 10 else MANY
            text.append(count.ljust(scale.cell), "yellow" if fewest == 1 else "green")
    text.rstrip()
    return text


def _legend(served: ClassView, scale: Scale, width: int, *, ascii_only: bool) -> list[Text]:
    """Return the legend of the marks in use; entries that do not fit go to a new line."""
    conditions = {node_condition(node) for node in served.nodes}
    entries = [f"{_letter(name, ascii_only=ascii_only)} {name}" for name in LETTERS if name in conditions]
    entries += [f"{GAP} not served"] if served.gaps else []
    entries += [f"{MANY} ten or more"] if max(served.replicas) >= 10 else []
    entries += [f"a column is {_blocks_per_column(scale)} blocks"] if scale.columns < scale.blocks else []
    lines = [""]
    for entry in entries:
        if lines[-1] and len(lines[-1]) + 3 + len(entry) > width:
            lines.append("")
        lines[-1] += f"   {entry}" if lines[-1] else entry
    return [Text(line[:width], "dim") for line in lines if line]


def _blocks_per_column(scale: Scale) -> str:
    low, high = scale.blocks // scale.columns, -(-scale.blocks // scale.columns)
    return str(low) if low == high else f"{low} or {high}"


def _letter(name: str, *, ascii_only: bool) -> str:
    return ASCII_ONLINE if ascii_only and name == "online" else LETTERS[name]
