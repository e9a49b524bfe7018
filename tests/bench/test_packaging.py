"""The package that users install holds no measuring code; the extra `bench` brings it."""

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

import treeswarm
import treeswarm_bench
from treeswarm.extras import install_command
from treeswarm_client import lab
from treeswarm_client.cli import measuring
from treeswarm_client.cli.main import main

ROOT = Path(__file__).parents[2]
MEASURING = ("bench", "lab/", "simulat", "hostile", "virtual_clock", "widened")


def absent(_name: str) -> None:
    """Stand in for `find_spec`, as if the package were not installed."""


def run(*command: str | Path) -> str:
    # With PYTHONPATH, an environment without the bench package would find this checkout's.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_distributions_have_one_version() -> None:
    assert treeswarm_bench.__version__ == treeswarm.__version__


def test_extra_bench_names_the_other_distribution() -> None:
    product = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    bench = tomllib.loads((ROOT / "bench" / "pyproject.toml").read_text("utf-8"))
    assert product["project"]["optional-dependencies"]["bench"] == [bench["project"]["name"]]
    assert all("bench" not in package for package in product["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])


@pytest.mark.parametrize("arguments", [["bench", "exact", "--json"], ["simulate", "--nodes", "3"]])
def test_missing_bench_package_is_named(
    arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "find_spec", absent)
    assert main(arguments) == 1
    printed = capsys.readouterr().err
    assert f"swarm {arguments[0]} is not installed here: {install_command('bench')}" in printed


def test_lab_alias_without_bench_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lab, "find_spec", absent)
    assert lab.main() == 1
    assert install_command("bench") in capsys.readouterr().err


def test_lab_alias_finds_the_lab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lab", "--help"])
    with pytest.raises(SystemExit) as ended:
        lab.main()
    assert ended.value.code == 0
    assert "--hosts" in capsys.readouterr().out


def test_bench_package_is_installed_here() -> None:
    assert find_spec(measuring.PACKAGE) is not None


@pytest.mark.slow
def test_product_wheel_holds_no_measuring_code(tmp_path: Path) -> None:
    """Both wheels are built, and installed without dependencies into an environment of their own."""
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT, ROOT / "bench")
    product, bench = sorted(tmp_path.glob("*.whl"), key=lambda wheel: "bench" in wheel.name)
    names = zipfile.ZipFile(product).namelist()
    gateway = Path("client/treeswarm_client/gateway")
    folders = (ROOT / gateway / "pages", ROOT / gateway / "web")
    pages = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert {str(file.relative_to(ROOT / "client")) for file in pages} <= set(names)
    names = [name for name in names if name.endswith(".py")]
    assert {name.split("/")[0] for name in names} == {"treeswarm", "treeswarm_client", "treeswarm_node"}
    assert not [name for name in names if any(word in name.removeprefix("treeswarm_") for word in MEASURING)]
    measuring_files = zipfile.ZipFile(bench).namelist()
    assert "treeswarm_bench/benchmarks/hostile.py" in measuring_files
    assert "treeswarm_bench/benchmarks/wan/prose.txt" in measuring_files
    venv.create(tmp_path / "env", with_pip=False, system_site_packages=False)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    zipfile.ZipFile(product).extractall(site)
    assert run(python, "-c", "import importlib.util as u; print(u.find_spec('treeswarm_bench'))").strip() == "None"
    zipfile.ZipFile(bench).extractall(site)
    assert run(python, "-c", "import treeswarm_bench; print(treeswarm_bench.__version__)").strip() == "0.1.0"
