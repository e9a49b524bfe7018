"""What the demo says at its end works where it was started; without a network it shows the bundled model."""

import shlex
from pathlib import Path

import pytest

from treeswarm.errors import ModelError
from treeswarm.model_files import resolve_model
from treeswarm_client.cli import demo_texts
from treeswarm_client.cli.demo_texts import CODE, QUESTION, DemoSetup, choose_setup, next_steps
from treeswarm_client.cli.main import make_parser
from treeswarm_client.prompt_encoder import load_prompt_encoder

DEMO = resolve_model("demo")
CHAT = DemoSetup("smollm2", DEMO, "auto", QUESTION, chats=True)


def test_next_steps_name_the_environment_that_commands_need() -> None:
    steps = next_steps(CHAT, Path("/src/treeswarm/.venv"), Path("/src/treeswarm"), ["/usr/bin", "/bin"])
    assert steps[0] == "Next, in /src/treeswarm:"
    assert steps[1].endswith(" . .venv/bin/activate")
    elsewhere = next_steps(CHAT, Path("/opt/env"), Path("/src/treeswarm"), ["/usr/bin"])
    assert elsewhere[1].endswith(". /opt/env/bin/activate")


def test_next_steps_skip_an_environment_that_is_active() -> None:
    steps = next_steps(CHAT, Path("/opt/env"), Path("/src"), ["/opt/env/bin", "/usr/bin"])
    assert not any("activate" in step for step in steps)


@pytest.mark.parametrize("model", [None, "bundled"])
def test_next_steps_are_commands_that_exist(model: str | None) -> None:
    setup = CHAT if model is None else choose_setup(model, None)[0]
    steps = next_steps(setup, Path("/opt/env"), Path("/src"), ["/opt/env/bin"])
    commands = [step[20:].partition("#")[0] for step in steps if step[20:].startswith("swarm ")]
    assert [command.split()[1] for command in commands] == ["demo", "chat", "serve"]
    for command in commands:
        make_parser().parse_args(shlex.split(command)[1:])


def test_demo_falls_back_to_the_bundled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **options: object) -> Path:
        if name == "demo":
            return DEMO
        raise ModelError(f"cannot fetch {name}")

    monkeypatch.setattr(demo_texts, "resolve_model", offline)
    setup, problem = choose_setup(None, "What is the capital of France?")
    assert (setup.model, setup.draft, setup.prompt) == ("demo", "demo-draft", CODE)
    assert str(problem) == "cannot fetch smollm2"
    with pytest.raises(ModelError, match="cannot fetch smollm2"):  # a model that was named is not replaced
        choose_setup("smollm2", None)


def test_a_question_is_asked_and_a_text_is_continued() -> None:
    encoder = load_prompt_encoder("demo", DEMO)
    assert CHAT.encode(encoder) == encoder.encode_chat([{"role": "user", "content": QUESTION}])
    bundled, problem = choose_setup("bundled", "import os")
    assert problem is None
    assert bundled.encode(encoder) == encoder.encode("import os")
