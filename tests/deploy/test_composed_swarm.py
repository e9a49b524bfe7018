"""Start the processes of compose.yaml without containers; only addresses and paths differ."""

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
from tests.deploy.test_monitoring import expressions, series_of
from tests.support.deploy_files import DEPLOY, SECRETS, Composed, composed, tool, yaml_documents
from tests.support.registry_media import free_port, until

from treeswarm.programs.settings import PREFIX

HERE = "127.0.0.1"
LOAD_S = 180.0
find_problem = runpy.run_path(str(DEPLOY / "container/healthcheck.py"))["find_problem"]


@dataclass(frozen=True)
class RunningService:
    """A running service of the compose file."""

    process: asyncio.subprocess.Process
    log: Path
    """File with all output."""

    async def stop(self) -> int:
        """Stop the service as Docker does, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), LOAD_S)


@contextlib.asynccontextmanager
async def run_service(
    name: str, command: Sequence[str | Path], environment: Mapping[str, str], folder: Path
) -> AsyncIterator[RunningService]:
    """Run a service with these settings, no others, and a home of its own."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**inherited, **environment, "XDG_STATE_HOME": str(folder / name)},
            stdout=out,
            stderr=out,
        )
    try:
        yield RunningService(process, log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@dataclass(frozen=True)
class AdaptedSwarm:
    """The services of the compose file, with addresses of this machine."""

    swarm: Composed
    ports: Mapping[str, int]
    """Ports on this machine, by `service:port`."""

    @classmethod
    def of(cls, swarm: Composed) -> "AdaptedSwarm":
        addresses = [
            "broker:1883",
            "gateway:8000",
            *(f"{name}:{port}" for name in swarm.nodes for port in (4001, 9100)),
        ]
        return cls(swarm, {address: free_port() for address in addresses})

    def environment(self, name: str) -> dict[str, str]:
        broker = f"{HERE}:{self.ports['broker:1883']}"
        variables = {key: value.replace("broker:1883", broker) for key, value in self.swarm.environment(name).items()}
        for variable in {"TREESWARM_LISTEN", "TREESWARM_METRICS"} & variables.keys():
            host, _, port = variables[variable].partition(":")
            assert host == "0.0.0.0"
            variables[variable] = f"{HERE}:{self.ports[f'{name}:{port}']}"
        return variables

    def broker_command(self, folder: Path) -> list[str]:
        """Return the exact command of the container, with `folder` in place of the container's folders."""
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
    """Return the status and text of a response; status 0 if there is none."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


async def test_composed_swarm_answers_is_scraped_and_stops_cleanly(tmp_path: Path) -> None:
    adapted = AdaptedSwarm.of(composed())
    programs = Path(sys.executable).parent
    url = f"http://{HERE}:{adapted.ports['gateway:8000']}"
    key = SECRETS["TREESWARM_API_KEY"]
    async with contextlib.AsyncExitStack() as stack:
        running: dict[str, RunningService] = {}

        async def start(name: str, *command: str | Path) -> None:
            running[name] = await stack.enter_async_context(
                run_service(name, command, adapted.environment(name), tmp_path)
            )

        def assert_alive() -> None:
            for name, service in running.items():
                assert service.process.returncode is None, f"{name} ended: {service.log.read_text('utf-8')}"

        async def ready() -> bool:
            assert_alive()
            return (await asyncio.to_thread(get, f"{url}/ready"))[0] == 200

        await start("broker", *adapted.broker_command(tmp_path))
        await until(lambda: listens(adapted.ports["broker:1883"]), "the broker listens")
        for name in adapted.swarm.nodes:
            await start(name, programs / "swarm-node")
        await start("gateway", programs / "swarm", "serve")
        await until(ready, "the gateway is ready", LOAD_S)

        body = {"model": "demo", "messages": [{"role": "user", "content": "def main("}], "max_tokens": 24}
        status, text = await asyncio.to_thread(get, f"{url}/v1/chat/completions", key, body)
        assert status == 200, text
        answer = json.loads(text)
        assert answer["choices"][0]["message"]["content"]
        assert answer["usage"]["completion_tokens"] > 0
        assert (await asyncio.to_thread(get, f"{url}/v1/chat/completions", "wrong", body))[0] == 401

        await assert_healthy(adapted)
        series = await scrape(adapted, key)
        queried = {name for where, query in expressions() if where.startswith("panel") for name in series_of(query)}
        # A refusal or a repair is exported once there is one.
        assert queried - series <= {"treeswarm_node_sessions_refused_total"}

        names = [*adapted.swarm.nodes, "gateway"]
        statuses = await asyncio.gather(*(running[name].stop() for name in names))
        logs = {name: running[name].log.read_text("utf-8") for name in names}
        assert dict(zip(names, statuses, strict=True)) == dict.fromkeys(names, 0), logs
        assert [name for name, text in logs.items() if "Traceback" in text] == [], logs


async def listens(port: int) -> bool:
    """Return whether any program listens on the port."""
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection(HERE, port)
        writer.transport.abort()
        return True
    return False


async def assert_healthy(adapted: AdaptedSwarm) -> None:
    """Run the images' own health checks."""
    for address, port in adapted.ports.items():
        if address.endswith(":9100"):
            assert await asyncio.to_thread(find_problem, f"http://{HERE}:{port}/metrics", "online") is None
    assert await asyncio.to_thread(find_problem, f"http://{HERE}:{adapted.ports['gateway:8000']}/health") is None


async def scrape(adapted: AdaptedSwarm, key: str) -> set[str]:
    """Return the series that Prometheus would have, scraped as prometheus.yaml says."""
    (config,) = yaml_documents(DEPLOY / "monitoring/prometheus.yaml")
    series: set[str] = set()
    for job in config["scrape_configs"]:
        for target in job["static_configs"][0]["targets"]:
            url = f"http://{HERE}:{adapted.ports[target]}/metrics"
            status, text = await asyncio.to_thread(get, url, key if "authorization" in job else "")
            assert status == 200, (target, text)
            series |= {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    return series
