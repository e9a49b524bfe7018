"""docs/python.md does what it says: every snippet runs, and prints what stands below it."""

import re
from pathlib import Path

import pytest

from treeswarm_client.local_swarm import LocalSwarm

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
WRITTEN_PEERS = "127.0.0.1:4001,127.0.0.1:4002,127.0.0.1:4003"
SNIPPET = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
SNIPPETS = [(found[1], found[2]) for found in SNIPPET.finditer(PAGE.read_text("utf-8"))]


def test_no_fence_of_the_page_is_overlooked() -> None:
    text = PAGE.read_text("utf-8")
    assert len(SNIPPETS) == text.count("```python\n") >= 8
    assert sum(printed is not None for _, printed in SNIPPETS) == text.count("```text\n") >= 2
    assert all(WRITTEN_PEERS in code for code, _ in SNIPPETS)


@pytest.mark.parametrize(("code", "printed"), SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs(
    three_nodes: LocalSwarm, capsys: pytest.CaptureFixture[str], code: str, printed: str | None
) -> None:
    exec(compile(code.replace(WRITTEN_PEERS, three_nodes.peers), str(PAGE), "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    assert out.strip(), "each shows something"
    if printed is not None:
        assert out == printed
