"""systemd accepts the units, and the programs accept their settings."""

import configparser
import re
import tomllib
from pathlib import Path

import pytest
from tests.support.deploy_files import DEPLOY, accepted_by_gateway, accepted_by_node, env_file, ran, tool

from treeswarm.programs.settings import PREFIX
from treeswarm_client.local_swarm import node_command
from treeswarm_node.cli.machine_checks import files_needed
from treeswarm_node.config import ModelConfig, NodeConfig

FOLDER = DEPLOY / "systemd"
UNITS = sorted(file.name for file in FOLDER.glob("*.service"))
WORST_EXPOSURE = 2.5  # out of 10; what GPUs and torch need leaves 2.0


def install(unit: str, folder: Path) -> Path:
    """Install a unit as an operator would, with the programs of this machine, and return its path."""
    here = Path(node_command()[0]).parent
    text = (FOLDER / unit).read_text("utf-8").replace("/opt/treeswarm/.venv/bin", str(here))
    path = folder / unit.replace("@.", "@gpu0.")
    path.write_text(text, "utf-8")
    return path


def read_service(unit: str) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(FOLDER / unit, "utf-8")
    return parser["Service"]


def test_there_are_three_units() -> None:
    assert UNITS == ["swarm-gateway.service", "swarm-node.service", "swarm-node@.service"]


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_understands_every_line(unit: str, tmp_path: Path) -> None:
    program = tool("systemd-analyze", "apt install systemd")
    path = install(unit, tmp_path)
    result = ran(program, "verify", "--man=no", path)
    # Its exit status is 0 even for unknown keys, but each complaint names the file.
    assert path.name not in result.stderr
    assert result.returncode == 0, result.stderr


def test_wrong_line_is_noticed(tmp_path: Path) -> None:
    path = install("swarm-node.service", tmp_path)
    path.write_text(path.read_text("utf-8").replace("NoNewPrivileges", "NoNewPriviliges"), "utf-8")
    program = tool("systemd-analyze", "apt install systemd")
    result = ran(program, "verify", "--man=no", path)
    assert path.name in result.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_unit_is_hardened(unit: str, tmp_path: Path) -> None:
    program = tool("systemd-analyze", "apt install systemd")
    result = ran(program, "security", "--offline=yes", "--no-pager", install(unit, tmp_path))
    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", result.stdout)
    assert exposure, result.stdout + result.stderr
    assert float(exposure[1]) <= WORST_EXPOSURE


@pytest.mark.parametrize("unit", UNITS)
def test_unit_reads_example_files_and_writes_to_own_folders(unit: str) -> None:
    section = read_service(unit)
    config, environment = section["ExecStart"].split()[-1], section["EnvironmentFile"].removeprefix("-")
    for path in (config, environment):
        assert (FOLDER / Path(path.replace("-%i", "")).name).is_file()
    own = {f"%S/{section['StateDirectory']}", f"%C/{section['CacheDirectory']}"}
    assert section["WorkingDirectory"] in own
    assert section["DynamicUser"] == "yes"
    for setting in section["Environment"].split():
        name, _, value = setting.partition("=")
        if value.startswith("%") and name != "XDG_STATE_HOME":  # programs add their own name to these two
            assert any(value.startswith(folder) for folder in own) or (name, value) == ("XDG_CACHE_HOME", "%C")
    if "XDG_STATE_HOME=%S" in section["Environment"]:
        assert section["StateDirectory"] == section["CacheDirectory"] == "treeswarm"


@pytest.mark.parametrize("unit", UNITS)
def test_unit_allows_enough_open_files(unit: str) -> None:
    assert int(read_service(unit)["LimitNOFILE"]) >= files_needed(NodeConfig(ModelConfig("demo")))


def test_stop_timeout_exceeds_the_nodes_grace() -> None:
    config = accepted_by_node({}, "--config", str(FOLDER / "node.toml"))
    for unit in UNITS[1:]:
        assert float(read_service(unit)["TimeoutStopSec"]) > config.limits.drain_grace_s + 10


def uncommented(path: Path, folder: Path) -> Path:
    """Write the example file with every proposed setting active, and return its path."""
    text = re.sub(r"^# ?(?=[\w-]+ = |[A-Z_]+=)", "", path.read_text("utf-8"), flags=re.M)
    active = folder / path.name
    active.write_text(text, "utf-8")
    return active


def test_node_example_is_accepted(tmp_path: Path) -> None:
    everything = uncommented(FOLDER / "node.toml", tmp_path)
    assert len(tomllib.loads(everything.read_text("utf-8"))["node"]) > 12
    assert accepted_by_node({}, "--config", str(everything)).device.name == "cuda"
    environment = env_file(uncommented(FOLDER / "node.env", tmp_path))
    assert any(name.startswith(PREFIX) for name in environment)
    accepted_by_node(environment, "--config", str(FOLDER / "node.toml"))


def test_gateway_example_is_accepted(tmp_path: Path) -> None:
    arguments = accepted_by_gateway({}, "--config", str(FOLDER / "gateway.toml"))
    assert arguments.listen == "127.0.0.1:8000"
    environment = env_file(uncommented(FOLDER / "gateway.env", tmp_path)) | {"TREESWARM_API_KEYS": "sk-for-tests"}
    arguments = accepted_by_gateway(environment, "--config", str(FOLDER / "gateway.toml"))
    assert arguments.registry.startswith("mqtts://")
