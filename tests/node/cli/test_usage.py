"""A node that is started without a model is told how, in a few lines."""

import pytest

from treeswarm_node.cli.arguments import make_parser


def test_no_arguments_print_two_examples_and_where_help_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        make_parser().parse_args([])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert max(map(len, lines)) <= 80
    assert lines[0] == "usage: swarm-node MODEL [flags]"
    assert "swarm-node --help" in lines[3]
    assert lines[4].endswith("the following arguments are required: MODEL")
