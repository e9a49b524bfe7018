"""Every hint to install something names a command that works where the program was installed."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from treeswarm import extras
from treeswarm.errors import BadRequest
from treeswarm.extras import MODULES, Origin, command_for, parse_origin, require

ROOT = Path(__file__).parents[2]
CLONE = Path("/src/treeswarm")
GIT = "git+https://example.org/treeswarm.git"
WHEEL = "https://example.org/dist/treeswarm-0.1.0-py3-none-any.whl"
# The name under which a distribution is imported, where that differs from its own.
MODULE_OF = {"prometheus-client": "prometheus_client", "treeswarm-bench": "treeswarm_bench"}


@pytest.mark.parametrize(
    ("origin", "cwd", "node", "bench"),
    [
        (Origin(CLONE), CLONE, "pip install '.[node,dht]'", "pip install ./bench"),
        (Origin(CLONE, editable=True), CLONE, "pip install -e '.[node,dht]'", "pip install -e ./bench"),
        (Origin(CLONE), Path("/home/me"), "pip install '/src/treeswarm[node,dht]'", "pip install /src/treeswarm/bench"),
        (
            Origin(url=GIT), CLONE, f"pip install 'treeswarm[node,dht] @ {GIT}'",
            f"pip install 'treeswarm-bench @ {GIT}#subdirectory=bench'",
        ),
        (
            Origin(url=WHEEL), CLONE, f"pip install 'treeswarm[node,dht] @ {WHEEL}'",
            f"pip install 'treeswarm-bench @ {WHEEL.replace('/treeswarm-', '/treeswarm_bench-')}'",
        ),
        (Origin(), CLONE, "pip install 'treeswarm[node,dht]'", "pip install 'treeswarm[bench]'"),
    ],
    ids=["in-clone", "editable", "elsewhere", "git", "wheel", "index"],
)  # fmt: skip
def test_install_command_follows_the_origin(origin: Origin, cwd: Path, node: str, bench: str) -> None:
    assert command_for(origin, cwd, "node", "dht") == node
    assert command_for(origin, cwd, "bench") == bench


def test_origin_is_read_from_the_record_that_pip_keeps() -> None:
    assert parse_origin({"url": "file:///my%20src", "dir_info": {"editable": True}}) == Origin(
        Path("/my src"), editable=True
    )
    assert parse_origin({"url": "file:///src", "dir_info": {}}) == Origin(Path("/src"))
    vcs = {"vcs": "git", "commit_id": "0a", "requested_revision": "v1"}
    assert parse_origin({"url": "https://example.org/t.git", "vcs_info": vcs}) == Origin(
        url="git+https://example.org/t.git@v1"
    )
    assert parse_origin({"url": WHEEL, "archive_info": {}}) == Origin(url=WHEEL)


def test_modules_are_those_of_the_extras_in_pyproject() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for extra, modules in MODULES.items():
        names = {re.split(r"[\[<>=;]", requirement)[0] for requirement in declared[extra]} - {"treeswarm"}
        assert {MODULE_OF.get(name, name) for name in names} == set(modules)


def test_missing_modules_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "read_origin", lambda: Origin(Path.cwd()))
    require("draft", "swarm generate")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BadRequest, match=r"^swarm-x needs torch, which is not installed: pip install '\.\[draft\]'$"):
        require("draft", "swarm-x")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadRequest, match="needs torch and transformers, which are not installed"):
        require("draft", "swarm-x")


def test_no_hint_to_install_is_written_by_hand() -> None:
    """A hint that names an index would name nothing: the package is on none."""
    by_hand = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("swarm", "node", "client", "bench")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "extras.py"
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if "treeswarm[" in line
    ]
    assert not by_hand
