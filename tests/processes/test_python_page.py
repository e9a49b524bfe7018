"""Every snippet of docs/python.md runs, and prints the text below it."""

import re
from pathlib import Path

import pytest

from treeswarm_client.local_swarm import LocalSwarm

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
WRITTEN_PEERS = "127.0.0.1:4001,127.0.0.1:4002,127.0.0.1:4003"
SNIPPET = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
SNIPPETS = [(match[1], match[2]) for match in SNIPPET.finditer(PAGE.read_text("utf-8"))]


def test_every_snippet_of_the_page_is_found() -> None:
    text = PAGE.read_text("utf-8")
    assert len(SNIPPETS) == text.count("```python\n") >= 8
    assert sum(printed is not None for _, printed in SNIPPETS) == text.count("```text\n") >= 2
    assert all(WRITTEN_PEERS in code for code, _ in SNIPPETS)


@pytest.mark.parametrize(("code", "printed"), SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_runs_and_prints_its_output(
    three_nodes: LocalSwarm, capsys: pytest.CaptureFixture[str], code: str, printed: str | None
) -> None:
    exec(compile(code.replace(WRITTEN_PEERS, three_nodes.peers), str(PAGE), "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    assert out.strip(), "every snippet prints something"
    if printed is not None:
        assert out == printed
