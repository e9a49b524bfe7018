"""The deployment pages name files, services and images that exist."""

import re
from pathlib import Path

import pytest
from tests.support.deploy_files import DEPLOY, ROOT, accepted_by_gateway, accepted_by_node

PAGES = sorted((ROOT / "docs/deploy").glob("*.md"))


def commands(page: Path) -> list[str]:
    """Return the commands of all shell blocks, with continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_each_kind_of_deployment_has_a_page() -> None:
    assert [page.stem for page in PAGES] == ["compose", "containers", "kubernetes", "systemd"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_named_on_a_page_exist(page: Path) -> None:
    named = re.findall(r"deploy/[\w./@-]*[\w]", page.read_text("utf-8"))
    named += [
        f"deploy/compose/{name}" for name in re.findall(r"\bcompose\.\w+\.yaml|example\.env\b", page.read_text("utf-8"))
    ]
    assert named
    missing = [name for name in named if not (ROOT / name).exists() and "secrets.example.env" not in name]
    assert [name for name in missing if not (ROOT / "deploy/kubernetes/base" / Path(name).name).exists()] == []


def test_docker_run_lines_are_accepted_by_the_programs() -> None:
    runs = [line for line in commands(ROOT / "docs/deploy/containers.md") if line.startswith("docker run")]
    assert len(runs) == 3
    for line in runs:
        environment = dict(re.findall(r"-e (\w+)=(\S+)", line.replace('"$(openssl rand -hex 24)"', "sk-for-tests")))
        image, *flags = line[re.search(r" treeswarm-(?:node|gateway)(?::\w+)? ", line).start() :].split()  # type: ignore[union-attr]
        (accepted_by_gateway if "gateway" in image else accepted_by_node)(environment, *flags)


def test_pages_generate_every_password_of_the_examples() -> None:
    for page, example in (("compose", "compose/example.env"), ("kubernetes", "kubernetes/base/secrets.example.env")):
        (loop,) = (line for line in commands(ROOT / f"docs/deploy/{page}.md") if line.startswith("for name in"))
        named = re.findall(r"for name in (.*?);", loop)[0].split()
        assert named == re.findall(r"^(\w+)=", (DEPLOY / example).read_text("utf-8"), re.M)
