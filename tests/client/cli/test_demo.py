"""What the demo says at its end works in the folder in which it was started."""

import shlex
from pathlib import Path

from treeswarm_client.cli.demo import NEXT, next_steps
from treeswarm_client.cli.main import make_parser


def test_next_steps_name_the_environment_that_commands_need() -> None:
    steps = next_steps(Path("/src/treeswarm/.venv"), Path("/src/treeswarm"), ["/usr/bin", "/bin"])
    assert steps[0] == "Next, in /src/treeswarm:"
    assert steps[1].endswith(" . .venv/bin/activate")
    elsewhere = next_steps(Path("/opt/env"), Path("/src/treeswarm"), ["/usr/bin"])
    assert elsewhere[1].endswith(". /opt/env/bin/activate")


def test_next_steps_skip_an_environment_that_is_active() -> None:
    steps = next_steps(Path("/opt/env"), Path("/src"), ["/opt/env/bin", "/usr/bin"])
    assert not any("activate" in step for step in steps)


def test_next_steps_are_commands_that_exist() -> None:
    commands = [command.partition("#")[0] for _, command in NEXT if command.startswith("swarm ")]
    assert [command.split()[1] for command in commands] == ["demo", "chat", "serve"]
    for command in commands:
        make_parser().parse_args(shlex.split(command)[1:])
