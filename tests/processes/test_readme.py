"""The snippets of README.md run as they are written, and those of the quick start that README.md lacks.

Addresses and the repository's URL are placeholders.  What stands in their place is what the programs print, under the
labels that README.md shows in the comments below its `swarm-node` command.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from tests.support.page_snippets import ROOT, Snippet, snippets, split_commands

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

README, QUICK_START = ROOT / "README.md", ROOT / "docs" / "quick-start.md"
# Lines that are not run, by what stands in them, with the reason.  The flags of all lines are parsed by
# tests/test_documented_commands.py.
NOT_RUN = {
    "Qwen/": "needs a GPU and a download of 16 GB",
    "make demo": "installs for minutes and downloads: only its target is looked up",
    ". .venv/bin/activate": "the tests run in an environment of their own",
}
# Programs that run until they are stopped, and the text after which they serve.
SERVING = {"swarm-node": "clients ask with", "swarm serve": "serving "}
# An address of a page, in the shell or in Python, that is no variable.
REGISTRY = re.compile(r"""(--registry |registry=)(?!\$)(?:"[^"]+"|[^\s"]+)""")
# Seconds that a program may take on a machine that is busy with other tests.
START_S = 280.0


@dataclass(frozen=True)
class StartedSwarm:
    """The swarm that README.md starts."""

    environment: Mapping[str, str]
    folder: Path
    printed: str
    """What the first node printed."""

    def label(self, label: str) -> str:
        """Return the command that the first node printed after a label."""
        found = re.search(rf"{re.escape(label)}:?\s+(.+)", self.printed)
        assert found, f"the node prints nothing after '{label}':\n{self.printed}"
        return found[1]

    @property
    def code(self) -> str:
        """The join code: what clients give as `--registry`."""
        words = self.label("clients ask with").split()
        return words[words.index("--registry") + 1]

    @property
    def client_environment(self) -> Mapping[str, str]:
        """The variables of a client; the pages call the join code `$CODE`."""
        return {**self.environment, "CODE": self.code}

    def fill_in(self, text: str) -> str:
        """Put the swarm's own code in place of a page's address."""
        return REGISTRY.sub(lambda found: found[1] + (repr(self.code) if found[1].endswith("=") else self.code), text)


def shell_lines(page: Path) -> list[str]:
    return [line for snippet in snippets(page) if snippet.language == "sh" for line in snippet.lines]


def client_lines(page: Path) -> list[str]:
    """Return the lines of a page that ask a swarm and end by themselves."""
    lines = [line for line in shell_lines(page) if line.startswith("swarm ") and not serves(line)]
    return [line for line in lines if not any(part in line for part in NOT_RUN)]


def starting_snippet() -> Snippet:
    """Return README's block that starts the first node."""
    (block,) = [s for s in snippets(README) if s.language == "sh" and re.search(r"^#.*join", s.code, re.MULTILINE)]
    return block


def serves(line: str) -> str | None:
    """Return the text after which the program of this line serves, or None if it ends by itself."""
    return next((text for program, text in SERVING.items() if re.match(rf"{program}(?!\S)", line)), None)


@contextlib.asynccontextmanager
async def serving(line: str, environment: Mapping[str, str], folder: Path) -> AsyncIterator[str]:
    """Run a line until its program serves, yield what it printed, and end it as Ctrl-C does."""
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", f"exec {line}"), cwd=folder, env=environment, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    printed, until = "", serves(line) or ""
    try:
        async with asyncio.timeout(START_S):
            while until not in printed:
                piece = await process.stdout.readline()
                assert piece, f"{line} ended: {printed}"
                printed += piece.decode()
        yield printed
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.communicate(), START_S)
    assert process.returncode == 0, line


async def run_line(line: str, swarm: StartedSwarm) -> str:
    """Run a line that ends by itself, and return what it prints.  A chat is asked one thing."""
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", line), cwd=swarm.folder, env=swarm.client_environment,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, errors = await asyncio.wait_for(process.communicate(b"def main():\n"), START_S)
    assert process.returncode == 0, f"{line}\n{errors.decode()}"
    return out.decode()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[StartedSwarm]:
    """Start the first node by README's command, and a second one by the line that the first prints for nodes."""
    folder = tmp_path_factory.mktemp("readme")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XDG_STATE_HOME": str(folder / "state"),
        "TREESWARM_LISTEN": "127.0.0.1:0",
    }
    (line,) = starting_snippet().lines
    async with serving(line, environment, folder) as printed:
        first = StartedSwarm(environment, folder, printed)
        async with serving(first.label("nodes join with"), environment, folder):
            yield first


async def test_every_line_is_run_or_has_a_reason() -> None:
    lines = shell_lines(README) + shell_lines(QUICK_START)
    programs = {words[0] for line in lines for words in split_commands(line)}
    assert programs <= {"git", "cd", "make", ".", "swarm", "swarm-node", "curl"}, "a new kind of line needs a test"
    assert all(any(part in line for line in lines) for part in NOT_RUN)


async def test_node_prints_the_lines_that_readme_shows(swarm: StartedSwarm) -> None:
    shown = re.findall(r"^#\s+([a-z ]+?):\s+(\S+)", starting_snippet().code, re.MULTILINE)
    assert len(shown) >= 2
    for label, word in shown:
        assert label in swarm.printed
        if word in ("swarm", "swarm-node"):
            assert swarm.label(label).startswith(f"{word} ")


async def test_clone_has_the_target_of_the_demo(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no git checkout")
    (clone,) = [line for line in shell_lines(README) if line.startswith("git clone")]
    script = f"{clone} && make --dry-run demo".replace("URL-OF-THIS-REPOSITORY", f"--quiet --depth 1 file://{ROOT}")
    process = await asyncio.create_subprocess_exec("sh", "-c", script, cwd=tmp_path, stdout=asyncio.subprocess.PIPE)
    assert (await process.communicate())[0]
    assert process.returncode == 0


async def test_lines_of_the_terminal_run(swarm: StartedSwarm) -> None:
    """The line that the node prints for clients runs, README's lines, and the quick start's of other commands."""
    lines = [swarm.label("clients ask with"), *client_lines(README)]
    commands = {line.split()[1] for line in lines}
    lines += [line for line in client_lines(QUICK_START) if line.split()[1] not in commands]
    assert len(lines) >= 4
    for printed in await asyncio.gather(*(run_line(swarm.fill_in(line), swarm) for line in lines)):
        assert printed.strip()


async def test_gateway_and_its_request_run(swarm: StartedSwarm) -> None:
    """The gateway listens on a free port, which stands in the request in place of 8000."""
    (line,) = [swarm.fill_in(line) for line in shell_lines(README) if serves(line) == "serving "]
    (request,) = [line for line in shell_lines(QUICK_START) if line.startswith("curl")]
    async with serving(line, swarm.client_environment, swarm.folder) as printed:
        found = re.search(r"http://127\.0\.0\.1:\d+", printed)
        assert found
        answer = await run_line(request.replace("http://127.0.0.1:8000", found[0]), swarm)
    assert '"object":"text_completion"' in answer


async def test_python_of_readme_runs(swarm: StartedSwarm) -> None:
    (snippet,) = [snippet for snippet in snippets(README) if snippet.language == "python"]
    program = f"{swarm.fill_in(snippet.code)}\nprint(tokenizer.decode(out[0]))\nmodel.client.close()"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, cwd=swarm.folder, env=swarm.client_environment, stdout=asyncio.subprocess.PIPE
    )
    printed = (await asyncio.wait_for(process.communicate(), START_S))[0].decode()
    assert process.returncode == 0
    assert printed.startswith("def read(self, size=-1):")
    assert len(printed) > len("def main(") + 20
