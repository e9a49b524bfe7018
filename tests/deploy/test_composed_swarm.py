"""The processes of compose.yaml, started as it says but without containers: only addresses and paths are others."""

import asyncio
import contextlib
import json
import os
import runpy
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from tests.deploy.test_monitoring import check, expressions
from tests.support.deploy_files import DEPLOY, SECRETS, Composed, composed, tool, yaml_documents
from tests.support.registry_media import free_port, until

from treeswarm.programs.settings import PREFIX

HERE = "127.0.0.1"
LOAD_S = 180.0
trouble = runpy.run_path(str(DEPLOY / "container/healthcheck.py"))["trouble"]


@dataclass(frozen=True)
class Service:
    """One of the compose file's, running."""

    process: asyncio.subprocess.Process
    said: Path
    """What it wrote."""

    async def ended(self) -> int:
        """Told as Docker tells it: its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), LOAD_S)


@contextlib.asynccontextmanager
async def service(
    name: str, command: Sequence[str | Path], environment: Mapping[str, str], folder: Path
) -> AsyncIterator[Service]:
    """With these settings and no others, and a home of its own."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
    said = folder / f"{name}.log"
    with said.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**inherited, **environment, "XDG_STATE_HOME": str(folder / name)},
            stdout=out,
            stderr=out,
        )
    try:
        yield Service(process, said)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@dataclass(frozen=True)
class Adapted:
    """The compose file's addresses, on this machine."""

    swarm: Composed
    ports: Mapping[str, int]
    """By `service:port`."""

    @classmethod
    def of(cls, swarm: Composed) -> "Adapted":
        places = ["broker:1883", "gateway:8000", *(f"{name}:{port}" for name in swarm.nodes for port in (4001, 9100))]
        return cls(swarm, {place: free_port() for place in places})

    def environment(self, name: str) -> dict[str, str]:
        broker = f"{HERE}:{self.ports['broker:1883']}"
        found = {key: value.replace("broker:1883", broker) for key, value in self.swarm.environment(name).items()}
        for variable in {"TREESWARM_LISTEN", "TREESWARM_METRICS"} & found.keys():
            host, _, port = found[variable].partition(":")
            assert host == "0.0.0.0"
            found[variable] = f"{HERE}:{self.ports[f'{name}:{port}']}"
        return found

    def broker(self, folder: Path) -> list[str]:
        """The very command of the container, with this folder for its own."""
        config = (DEPLOY / "compose/mosquitto.conf").read_text("utf-8")
        config = config.replace("listener 1883", f"listener {self.ports['broker:1883']} {HERE}")
        config = config.replace("/tmp/", f"{folder}/") + ("user root\n" if os.geteuid() == 0 else "")
        (folder / "mosquitto.conf").write_text(config, "utf-8")
        (command,) = self.swarm.services["broker"]["command"]
        command = command.replace("$$", "$").replace("/tmp/", f"{folder}/")
        command = command.replace("/mosquitto/config/", f"{folder}/")
        command = command.replace("exec mosquitto", f"exec {tool('mosquitto', 'apt install mosquitto')}")
        return [*self.swarm.services["broker"]["entrypoint"], command]


def get(url: str, key: str = "", body: object = None) -> tuple[int, str]:
    """Status and text."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(asked, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


async def test_what_compose_starts_answers_is_watched_and_takes_its_leave(tmp_path: Path) -> None:
    adapted = Adapted.of(composed())
    programs = Path(sys.executable).parent
    url = f"http://{HERE}:{adapted.ports['gateway:8000']}"
    key = SECRETS["TREESWARM_API_KEY"]
    async with contextlib.AsyncExitStack() as stack:
        running: dict[str, Service] = {}

        async def start(name: str, *command: str | Path) -> None:
            running[name] = await stack.enter_async_context(service(name, command, adapted.environment(name), tmp_path))

        def alive() -> None:
            for name, one in running.items():
                assert one.process.returncode is None, f"{name} ended: {one.said.read_text('utf-8')}"

        async def ready() -> bool:
            alive()
            return (await asyncio.to_thread(get, f"{url}/ready"))[0] == 200

        await start("broker", *adapted.broker(tmp_path))
        await until(lambda: listens(adapted.ports["broker:1883"]), "the broker listens")
        for name in adapted.swarm.nodes:
            await start(name, programs / "swarm-node")
        await start("gateway", programs / "swarm", "serve")
        await until(ready, "the gateway is ready", LOAD_S)

        asked = {"model": "demo", "messages": [{"role": "user", "content": "def main("}], "max_tokens": 24}
        status, text = await asyncio.to_thread(get, f"{url}/v1/chat/completions", key, asked)
        assert status == 200, text
        answer = json.loads(text)
        assert answer["choices"][0]["message"]["content"]
        assert answer["usage"]["completion_tokens"] > 0
        assert (await asyncio.to_thread(get, f"{url}/v1/chat/completions", "wrong", asked))[0] == 401

        await healthy(adapted)
        told = await scraped(adapted, key)
        wanted = {name for where, query in expressions() if where.startswith("panel") for name in check(query)}
        # A refusal or a failover would be told once there is one.
        assert wanted - told <= {"treeswarm_node_sessions_refused_total"}

        names = [*adapted.swarm.nodes, "gateway"]
        ends = await asyncio.gather(*(running[name].ended() for name in names))
        said = {name: running[name].said.read_text("utf-8") for name in names}
        assert dict(zip(names, ends, strict=True)) == dict.fromkeys(names, 0), said
        assert [name for name, text in said.items() if "Traceback" in text] == [], said


async def listens(port: int) -> bool:
    """Whether somebody does."""
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection(HERE, port)
        writer.transport.abort()
        return True
    return False


async def healthy(adapted: Adapted) -> None:
    """By the images' own health checks."""
    for place, port in adapted.ports.items():
        if place.endswith(":9100"):
            assert await asyncio.to_thread(trouble, f"http://{HERE}:{port}/metrics", "online") is None
    assert await asyncio.to_thread(trouble, f"http://{HERE}:{adapted.ports['gateway:8000']}/health") is None


async def scraped(adapted: Adapted, key: str) -> set[str]:
    """The series that Prometheus would have, asking as prometheus.yaml says."""
    (config,) = yaml_documents(DEPLOY / "monitoring/prometheus.yaml")
    found: set[str] = set()
    for job in config["scrape_configs"]:
        for target in job["static_configs"][0]["targets"]:
            url = f"http://{HERE}:{adapted.ports[target]}/metrics"
            status, text = await asyncio.to_thread(get, url, key if "authorization" in job else "")
            assert status == 200, (target, text)
            found |= {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    return found
