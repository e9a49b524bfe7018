"""Manifests: Kubernetes' own schema, kustomize where it is, and settings that the programs take."""

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
# Of the Prometheus operator; no schema of Kubernetes' own.
FOREIGN = {"ServiceMonitor", "Kustomization"}


def key(document: dict[str, Any]) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


def merged(base: Any, patch: Any) -> Any:
    """A strategic merge: maps by key, lists of named things by name, other lists whole."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {name: merged(base.get(name), value) for name, value in patch.items()}
    if isinstance(base, list) and isinstance(patch, list) and all("name" in item for item in [*base, *patch]):
        of = {item["name"]: item for item in patch}
        new = [item for item in patch if item["name"] not in {old["name"] for old in base}]
        return [merged(item, of.get(item["name"], {})) for item in base] + new
    return patch


def kustomization(name: str) -> dict[str, Any]:
    (found,) = yaml_documents(FOLDER / name / "kustomization.yaml")
    return found


def built(name: str) -> list[dict[str, Any]]:
    """What kustomize makes of a folder, but for images and the endings of generated names."""
    told = kustomization(name)
    found: list[dict[str, Any]] = []
    for resource in told["resources"]:
        inside = FOLDER / name / resource
        found += built(str(Path(name, resource).name)) if inside.is_dir() else yaml_documents(inside)
    for generator in told["configMapGenerator"]:
        files = {file: (FOLDER / name / file).read_text("utf-8") for file in generator.get("files", [])}
        for file in generator.get("envs", []):
            files |= env_file(FOLDER / name / file)
        made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": files}
        old = next((document for document in found if key(document) == key(made)), None)
        assert (old is not None) == (generator.get("behavior") == "merge")
        found = [merged(document, made) if document is old else document for document in found]
        found += [] if old else [made]
    for generator in told.get("secretGenerator", []):
        example = [Path(file).with_suffix(".example.env").name for file in generator["envs"]]
        data = {name_: value for file in example for name_, value in env_file(FOLDER / name / file).items()}
        found.append(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": generator["name"]}, "stringData": data}
        )
    for patch in told.get("patches", []):
        (wanted,) = yaml_documents(FOLDER / name / patch["path"])
        assert key(wanted) in map(key, found)
        found = [merged(document, wanted) if key(document) == key(wanted) else document for document in found]
    return found


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for document in documents:
        if "template" in document.get("spec", {}):
            yield document["metadata"]["name"], document["spec"]["template"]


def environment(documents: list[dict[str, Any]], name: str) -> dict[str, str]:
    """As Kubernetes would set it for the container of this name."""
    told = {key(document): document for document in documents}
    (container,) = next(pod["spec"]["containers"] for owner, pod in pods(documents) if owner == name)
    found: dict[str, str] = {}
    for source in container["envFrom"]:
        found |= told["ConfigMap", source["configMapRef"]["name"]]["data"]
    for variable in container["env"]:
        if "valueFrom" in variable:
            secret = variable["valueFrom"]["secretKeyRef"]
            found[variable["name"]] = told["Secret", secret["name"]]["stringData"][secret["key"]]
        else:
            # Only what stands above it is put in.
            found[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda named: found[named[1]], variable["value"])
    return found


@pytest.mark.parametrize("name", ["base", "cuda"])
def test_kubernetes_schema_is_met(name: str) -> None:
    validate = module("kubernetes_validate").validate
    documents = [*built(name), *yaml_documents(*(FOLDER / "extras").glob("*.yaml"))]
    assert {"StatefulSet", "Deployment", "Service", "Ingress"} <= {document["kind"] for document in documents}
    for document in documents:
        if document["kind"] not in FOREIGN:
            validate(document, SCHEMA, strict=True)


def test_a_wrong_line_would_have_been_noticed() -> None:
    kubernetes = module("kubernetes_validate")
    (nodes,) = (document for document in built("base") if document["kind"] == "StatefulSet")
    wrong = merged(nodes, {"spec": {"template": {"spec": {"containers": [{"name": "node", "livenesProbe": {}}]}}}})
    with pytest.raises(kubernetes.ValidationError, match="livenesProbe"):
        kubernetes.validate(wrong, SCHEMA, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is in no package of Debian's that knows `patches`")
@pytest.mark.parametrize("name", ["base", "cuda"])
def test_kustomize_makes_the_same_of_it(name: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    base = tmp_path / "kubernetes/base"
    shutil.copy(base / "secrets.example.env", base / "secrets.env")
    done = ran("kubectl", "kustomize", tmp_path / "kubernetes" / name)
    assert done.returncode == 0, done.stderr
    made = [document for document in module("yaml").safe_load_all(done.stdout) if document]
    assert {document["metadata"].get("namespace", "treeswarm") for document in made} == {"treeswarm"}
    assert len(made) == len(built(name))
    (real,) = (document for document in made if document["kind"] == "StatefulSet")
    (ours,) = (document for document in built(name) if document["kind"] == "StatefulSet")
    resources = [document["spec"]["template"]["spec"]["containers"][0]["resources"] for document in (real, ours)]
    assert resources[0] == resources[1]
    settings = [document for document in made if document["metadata"]["name"].startswith("node-settings-")]
    assert [document["data"] for document in settings] == [
        document["data"] for document in built(name) if document["metadata"]["name"] == "node-settings"
    ]


@pytest.mark.parametrize("name", ["base", "cuda"])
def test_the_programs_take_their_settings(name: str) -> None:
    documents = built(name)
    node = accepted_by_node(environment(documents, "node"))
    gateway = accepted_by_gateway(environment(documents, "gateway"))
    assert node.model.name == gateway.model
    assert node.network.registry == gateway.registry
    assert node.device.name == {"base": "cpu", "cuda": "cuda"}[name]
    (grace,) = (pod["spec"]["terminationGracePeriodSeconds"] for owner, pod in pods(documents) if owner == "node")
    assert grace > node.limits.drain_grace_s + 10


def test_nodes_together_have_all_blocks_of_the_demo_model() -> None:
    documents = built("base")
    (replicas,) = (document["spec"]["replicas"] for document in documents if document["kind"] == "StatefulSet")
    node = accepted_by_node(environment(documents, "node"))
    assert replicas * (node.model.num_blocks or 0) >= 8


def test_selectors_and_names_meet() -> None:
    documents = [*built("base"), *yaml_documents(*(FOLDER / "extras").glob("*.yaml"))]
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


def test_probes_ask_what_the_gateway_answers() -> None:
    app = make_app(Backend(GatewayConfig(("demo",)), lambda: SwarmClient(model="demo", peers="127.0.0.1:1")))
    routes = {route.path for route in app.routes if isinstance(route, APIRoute)}
    (container,) = next(pod["spec"]["containers"] for owner, pod in pods(built("base")) if owner == "gateway")
    asked = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {"/health", "/ready"} <= routes


def test_all_pods_are_restricted() -> None:
    for owner, pod in pods(built("cuda")):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True, owner
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["enableServiceLinks"] is False, "or variables of services would look like settings"
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_the_broker_is_the_same_as_in_compose() -> None:
    texts = [(DEPLOY / folder / "mosquitto.conf").read_text("utf-8") for folder in ("compose", "kubernetes/base")]
    assert texts[0] == texts[1]
