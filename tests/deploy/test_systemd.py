"""Units: systemd's own verdict, and settings that the programs take."""

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
WORST_EXPOSURE = 2.5  # of 10; what GPUs and torch need leaves 2.0


def installed(unit: str, folder: Path) -> Path:
    """The unit as an operator would have it, with programs that are on this machine."""
    here = Path(node_command()[0]).parent
    text = (FOLDER / unit).read_text("utf-8").replace("/opt/treeswarm/.venv/bin", str(here))
    path = folder / unit.replace("@.", "@gpu0.")
    path.write_text(text, "utf-8")
    return path


def service(unit: str) -> configparser.SectionProxy:
    read = configparser.ConfigParser(interpolation=None, strict=False)
    read.optionxform = str  # type: ignore[assignment,method-assign]
    read.read(FOLDER / unit, "utf-8")
    return read["Service"]


def test_there_are_three() -> None:
    assert UNITS == ["swarm-gateway.service", "swarm-node.service", "swarm-node@.service"]


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_understands_every_line(unit: str, tmp_path: Path) -> None:
    program = tool("systemd-analyze", "apt install systemd")
    path = installed(unit, tmp_path)
    done = ran(program, "verify", "--man=no", path)
    # It ends with 0 for unknown keys too, and names the file with each complaint.
    assert path.name not in done.stderr
    assert done.returncode == 0, done.stderr


def test_a_wrong_line_would_have_been_noticed(tmp_path: Path) -> None:
    path = installed("swarm-node.service", tmp_path)
    path.write_text(path.read_text("utf-8").replace("NoNewPrivileges", "NoNewPriviliges"), "utf-8")
    program = tool("systemd-analyze", "apt install systemd")
    done = ran(program, "verify", "--man=no", path)
    assert path.name in done.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_it_is_hardened(unit: str, tmp_path: Path) -> None:
    program = tool("systemd-analyze", "apt install systemd")
    done = ran(program, "security", "--offline=yes", "--no-pager", installed(unit, tmp_path))
    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure, done.stdout + done.stderr
    assert float(exposure[1]) <= WORST_EXPOSURE


@pytest.mark.parametrize("unit", UNITS)
def test_what_it_reads_is_in_this_folder_and_what_it_writes_is_its_own(unit: str) -> None:
    said = service(unit)
    config, environment = said["ExecStart"].split()[-1], said["EnvironmentFile"].removeprefix("-")
    for path in (config, environment):
        assert (FOLDER / Path(path.replace("-%i", "")).name).is_file()
    own = {f"%S/{said['StateDirectory']}", f"%C/{said['CacheDirectory']}"}
    assert said["WorkingDirectory"] in own
    assert said["DynamicUser"] == "yes"
    for setting in said["Environment"].split():
        name, _, value = setting.partition("=")
        if value.startswith("%") and name != "XDG_STATE_HOME":  # programs add their own name to these two
            assert any(value.startswith(folder) for folder in own) or (name, value) == ("XDG_CACHE_HOME", "%C")
    if "XDG_STATE_HOME=%S" in said["Environment"]:
        assert said["StateDirectory"] == said["CacheDirectory"] == "treeswarm"


@pytest.mark.parametrize("unit", UNITS)
def test_it_may_have_more_sockets_than_the_usual_1024(unit: str) -> None:
    assert int(service(unit)["LimitNOFILE"]) >= files_needed(NodeConfig(ModelConfig("demo")))


def test_a_node_has_time_to_take_its_leave() -> None:
    config = accepted_by_node({}, "--config", str(FOLDER / "node.toml"))
    for unit in UNITS[1:]:
        assert float(service(unit)["TimeoutStopSec"]) > config.limits.drain_grace_s + 10


def uncommented(path: Path, folder: Path) -> Path:
    """The example with all that it proposes."""
    text = re.sub(r"^# ?(?=[\w-]+ = |[A-Z_]+=)", "", path.read_text("utf-8"), flags=re.M)
    made = folder / path.name
    made.write_text(text, "utf-8")
    return made


def test_the_nodes_example_is_accepted(tmp_path: Path) -> None:
    everything = uncommented(FOLDER / "node.toml", tmp_path)
    assert len(tomllib.loads(everything.read_text("utf-8"))["node"]) > 12
    assert accepted_by_node({}, "--config", str(everything)).device.name == "cuda"
    environment = env_file(uncommented(FOLDER / "node.env", tmp_path))
    assert any(name.startswith(PREFIX) for name in environment)
    accepted_by_node(environment, "--config", str(FOLDER / "node.toml"))


def test_the_gateways_example_is_accepted(tmp_path: Path) -> None:
    plain = accepted_by_gateway({}, "--config", str(FOLDER / "gateway.toml"))
    assert plain.listen == "127.0.0.1:8000"
    environment = env_file(uncommented(FOLDER / "gateway.env", tmp_path)) | {"TREESWARM_API_KEYS": "sk-for-tests"}
    told = accepted_by_gateway(environment, "--config", str(FOLDER / "gateway.toml"))
    assert told.registry.startswith("mqtts://")
