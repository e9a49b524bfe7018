"""What `swarm demo` runs and writes: the models that it knows, their prompts, and what to try next."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treeswarm.errors import BadRequest, ModelError
from treeswarm.model_files import resolve_model
from treeswarm.progress import Progress
from treeswarm_client.prompt_encoder import PromptEncoder

CHAT_MODEL = "smollm2"
BUNDLED_NAME, BUNDLED_MODEL, BUNDLED_DRAFT = "bundled", "demo", "demo-draft"
# Its answer repeats words of the question, so that drafting from the text alone finds something.
QUESTION = (
    "The swarm has three nodes. The first node holds the first ten blocks of the model, the second node holds the next "
    "ten blocks, and the third node holds the last ten blocks. What does each node hold?"
)
CODE = '''def copy(src, dst, *, follow_symlinks=True):
    """Copy data and mode bits'''


@dataclass(frozen=True)
class DemoSetup:
    """The model of one demo, and what it writes."""

    model: str
    """Name of the target, as nodes and clients take it."""
    folder: Path
    """Directory of its config and tokenizer."""
    draft: str
    """Name of the drafter."""
    prompt: str
    """The user's question, or the text to continue."""
    chats: bool
    """Whether the prompt is a message to answer, rather than a text to continue."""

    def encode(self, encoder: PromptEncoder) -> list[int]:
        """Return the token ids of the prompt.  Raises BadRequest."""
        if self.chats:
            return encoder.encode_chat([{"role": "user", "content": self.prompt}])
        return encoder.encode(self.prompt)


def choose_setup(
    name: str | None, prompt: str | None, progress: Progress | None = None
) -> tuple[DemoSetup, ModelError | BadRequest | None]:
    """Find the model to show; `name` is None for SmolLM2 or, where it cannot be fetched, the bundled model.

    Return with it why it is not SmolLM2, or None.  Raises ModelError or BadRequest for a model that was named.
    """
    if name == BUNDLED_NAME:
        return _bundled(prompt), None
    try:
        folder = resolve_model(name or CHAT_MODEL, progress=progress)
    except (ModelError, BadRequest) as error:
        if name is not None:
            raise
        return _bundled(None), error
    return DemoSetup(name or CHAT_MODEL, folder, "auto", prompt or QUESTION, chats=True), None


def _bundled(prompt: str | None) -> DemoSetup:
    return DemoSetup(BUNDLED_MODEL, resolve_model(BUNDLED_MODEL), BUNDLED_DRAFT, prompt or CODE, chats=False)


def next_steps(setup: DemoSetup, environment: Path, folder: Path, path: Sequence[str]) -> list[str]:
    """Return what to try next, as commands that work in this folder.

    `environment` is the folder of the Python environment that runs, `path` the folders in which commands are found.
    """
    lines = [f"Next, in {folder}:"]
    if str(environment / "bin") not in path:
        shown = environment.relative_to(folder) if environment.is_relative_to(folder) else environment
        lines.append(f"  {'once per terminal':<17} . {shown}/bin/activate")
    return lines + [f"  {what:<17} {command}" for what, command in _commands(setup)]


def _commands(setup: DemoSetup) -> tuple[tuple[str, str], ...]:
    """Return what to try after the demo, and the command for it."""
    model = setup.model
    example = "Why is the sky blue?" if setup.chats else "def read(self, size=-1):"
    return (
        ("your own prompt", f'swarm demo{"" if setup.chats else " --model bundled"} --prompt "{example}"'),
        ("a swarm to keep", f"swarm-node {model}"),
        ("  its join code", "CODE=swarm:…   # in a second terminal: what that node prints after `join code`"),
        ("  chat with it", f"swarm chat --model {model} --registry $CODE"),
        ("  see its map", f"swarm serve --model {model} --registry $CODE  # then open http://127.0.0.1:8000/map/"),
        (
            "a second machine",
            "install there in the same way, and run the line that the first node prints after `nodes join with`",
        ),
    )
