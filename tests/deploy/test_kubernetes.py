"""Manifests meet Kubernetes' schema, build with kustomize as expected, and have settings that the programs accept."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from tests.support.deploy_files import (
    DEPLOY,
    accepted_by_gateway,
    accepted_by_node,
    env_file,
    module,
    ran,
    yaml_documents,
)

from treeswarm_client.client import SwarmClient
from treeswarm_client.gateway.app import make_app
from treeswarm_client.gateway.backend import Backend
from treeswarm_client.gateway.config import GatewayConfig

FOLDER = DEPLOY / "kubernetes"
SCHEMA = "1.37"
# Kinds of the Prometheus operator and of kustomize, which are not in Kubernetes' own schema.
FOREIGN = {"ServiceMonitor", "Kustomization"}


def key(document: dict[str, Any]) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


def merge(base: Any, patch: Any) -> Any:
    """Merge strategically: maps by key, lists of named items by name, other lists whole."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {name: merge(base.get(name), value) for name, value in patch.items()}
    if isinstance(base, list) and isinstance(patch, list) and all("name" in item for item in [*base, *patch]):
        patches = {item["name"]: item for item in patch}
        new = [item for item in patch if item["name"] not in {old["name"] for old in base}]
        return [merge(item, patches.get(item["name"], {})) for item in base] + new
    return patch


def kustomization(name: str) -> dict[str, Any]:
    (document,) = yaml_documents(FOLDER / name / "kustomization.yaml")
    return document


def build(name: str) -> list[dict[str, Any]]:
    """Return what kustomize builds from a folder, except for images and the suffixes of generated names."""
    config = kustomization(name)
    documents: list[dict[str, Any]] = []
    for resource in config["resources"]:
        inside = FOLDER / name / resource
        documents += build(str(Path(name, resource).name)) if inside.is_dir() else yaml_documents(inside)
    for generator in config["configMapGenerator"]:
        files = {file: (FOLDER / name / file).read_text("utf-8") for file in generator.get("files", [])}
        for file in generator.get("envs", []):
            files |= env_file(FOLDER / name / file)
        config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": files}
        old = next((document for document in documents if key(document) == key(config_map)), None)
        assert (old is not None) == (generator.get("behavior") == "merge")
        documents = [merge(document, config_map) if document is old else document for document in documents]
        documents += [] if old else [config_map]
    for generator in config.get("secretGenerator", []):
        example = [Path(file).with_suffix(".example.env").name for file in generator["envs"]]
        data = {name_: value for file in example for name_, value in env_file(FOLDER / name / file).items()}
        documents.append(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": generator["name"]}, "stringData": data}
        )
    for patch in config.get("patches", []):
        (change,) = yaml_documents(FOLDER / name / patch["path"])
        assert key(change) in map(key, documents)
        documents = [merge(document, change) if key(document) == key(change) else document for document in documents]
    return documents


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for document in documents:
        if "template" in document.get("spec", {}):
            yield document["metadata"]["name"], document["spec"]["template"]


def environment(documents: list[dict[str, Any]], name: str) -> dict[str, str]:
    """Return the environment that Kubernetes would set for the container of this name."""
    by_key = {key(document): document for document in documents}
    (container,) = next(pod["spec"]["containers"] for owner, pod in pods(documents) if owner == name)
    variables: dict[str, str] = {}
    for source in container["envFrom"]:
        variables |= by_key["ConfigMap", source["configMapRef"]["name"]]["data"]
    for variable in container["env"]:
        if "valueFrom" in variable:
            secret = variable["valueFrom"]["secretKeyRef"]
            variables[variable["name"]] = by_key["Secret", secret["name"]]["stringData"][secret["key"]]
        else:
            # Kubernetes substitutes only variables that are defined above this one.
            variables[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], variable["value"])
    return variables


@pytest.mark.parametrize("name", ["base", "cuda"])
def test_manifests_meet_the_schema(name: str) -> None:
    validate = module("kubernetes_validate").validate
    documents = [*build(name), *yaml_documents(*(FOLDER / "extras").glob("*.yaml"))]
    assert {"StatefulSet", "Deployment", "Service", "Ingress"} <= {document["kind"] for document in documents}
    for document in documents:
        if document["kind"] not in FOREIGN:
            validate(document, SCHEMA, strict=True)


def test_wrong_line_is_noticed() -> None:
    kubernetes = module("kubernetes_validate")
    (nodes,) = (document for document in build("base") if document["kind"] == "StatefulSet")
    wrong = merge(nodes, {"spec": {"template": {"spec": {"containers": [{"name": "node", "livenesProbe": {}}]}}}})
    with pytest.raises(kubernetes.ValidationError, match="livenesProbe"):
        kubernetes.validate(wrong, SCHEMA, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="Debian packages no kubectl that supports `patches`")
@pytest.mark.parametrize("name", ["base", "cuda"])
def test_kustomize_builds_the_same(name: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    base = tmp_path / "kubernetes/base"
    shutil.copy(base / "secrets.example.env", base / "secrets.env")
    result = ran("kubectl", "kustomize", tmp_path / "kubernetes" / name)
    assert result.returncode == 0, result.stderr
    output = [document for document in module("yaml").safe_load_all(result.stdout) if document]
    assert {document["metadata"].get("namespace", "treeswarm") for document in output} == {"treeswarm"}
    assert len(output) == len(build(name))
    (real,) = (document for document in output if document["kind"] == "StatefulSet")
    (ours,) = (document for document in build(name) if document["kind"] == "StatefulSet")
    resources = [document["spec"]["template"]["spec"]["containers"][0]["resources"] for document in (real, ours)]
    assert resources[0] == resources[1]
    settings = [document for document in output if document["metadata"]["name"].startswith("node-settings-")]
    assert [document["data"] for document in settings] == [
        document["data"] for document in build(name) if document["metadata"]["name"] == "node-settings"
    ]


@pytest.mark.parametrize("name", ["base", "cuda"])
def test_programs_accept_their_settings(name: str) -> None:
    documents = build(name)
    node = accepted_by_node(environment(documents, "node"))
    gateway = accepted_by_gateway(environment(documents, "gateway"))
    assert node.model.name == gateway.model
    assert node.network.registry == gateway.registry
    assert node.device.name == {"base": "auto", "cuda": "cuda"}[name]
    (grace,) = (pod["spec"]["terminationGracePeriodSeconds"] for owner, pod in pods(documents) if owner == "node")
    assert grace > node.limits.drain_grace_s + 10


def test_replicas_host_all_blocks_of_the_demo_model() -> None:
    documents = build("base")
    (replicas,) = (document["spec"]["replicas"] for document in documents if document["kind"] == "StatefulSet")
    node = accepted_by_node(environment(documents, "node"))
    assert replicas * (node.model.num_blocks or 0) >= 8


def test_selectors_match_names_and_ports() -> None:
    documents = [*build("base"), *yaml_documents(*(FOLDER / "extras").glob("*.yaml"))]
    labels = {owner: pod["metadata"]["labels"] for owner, pod in pods(documents)}
    ports = {
        owner: {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
        for owner, pod in pods(documents)
    }
    services = {document["metadata"]["name"]: document for document in documents if document["kind"] == "Service"}
    for document in documents:
        if document["kind"] in ("StatefulSet", "Deployment"):
            assert document["spec"]["selector"]["matchLabels"].items() <= labels[document["metadata"]["name"]].items()
    for service in services.values():
        chosen = [owner for owner in labels if service["spec"]["selector"].items() <= labels[owner].items()]
        assert len(chosen) == 1
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports[chosen[0]]
    (ingress,) = (document for document in documents if document["kind"] == "Ingress")
    backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend["port"]["name"] in {port["name"] for port in services[backend["name"]]["spec"]["ports"]}
    monitors = [document["spec"] for document in documents if document["kind"] == "ServiceMonitor"]
    assert len(monitors) == 2
    for monitor in monitors:
        chosen_services = [
            service
            for service in services.values()
            if monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        ]
        assert len(chosen_services) == 1
        offered = {port["name"] for port in chosen_services[0]["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["endpoints"]} <= offered


def test_probes_use_routes_of_the_gateway() -> None:
    app = make_app(Backend(GatewayConfig(("demo",)), lambda: SwarmClient(model="demo", peers="127.0.0.1:1")))
    routes = {route.path for route in app.routes if isinstance(route, APIRoute)}
    (container,) = next(pod["spec"]["containers"] for owner, pod in pods(build("base")) if owner == "gateway")
    paths = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"/health", "/ready"} <= routes


def test_pods_are_restricted() -> None:
    for owner, pod in pods(build("cuda")):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True, owner
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["enableServiceLinks"] is False, "variables of services would look like settings"
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_broker_config_is_the_same_as_in_compose() -> None:
    texts = [(DEPLOY / folder / "mosquitto.conf").read_text("utf-8") for folder in ("compose", "kubernetes/base")]
    assert texts[0] == texts[1]
