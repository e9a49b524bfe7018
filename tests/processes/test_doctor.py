"""`swarm doctor` with a whole swarm of real nodes, with a gap, and with no node."""

import asyncio
import contextlib
import json
import socket
import sys

from treeswarm.protocol.spans import Span
from treeswarm_client.local_swarm import local_swarm


async def run_doctor(*arguments: str) -> tuple[int | None, dict[str, dict[str, str]]]:
    """Run the doctor; return its exit status and its findings by check."""
    command = [sys.executable, "-m", "treeswarm_client.cli.main", "doctor", *arguments, "--json"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), 120)
    findings = json.loads(output)["findings"]
    assert all(finding["next"] for finding in findings if finding["verdict"] != "ok")
    return process.returncode, {finding["check"]: finding for finding in findings}


async def test_doctor_reports_a_gap_and_a_registry_without_answer() -> None:
    async with local_swarm("demo", [Span(0, 5)], flags=("--kv-tokens", "1024")) as swarm:
        status, findings_by_check = await run_doctor("--registry", swarm.nodes[0].pinned, "--model", "demo")
        assert status == 1
        assert "no node serves blocks 5:8 of 8" in findings_by_check["blocks"]["said"]
        assert "swarm-node demo" in findings_by_check["blocks"]["next"]
        assert {findings_by_check[check]["verdict"] for check in ("registry", "nodes", "clock", "model")} == {"ok"}
        await swarm.start("--blocks", "5:8")
        status, findings_by_check = await run_doctor("--peers", swarm.peers)
        assert status == 0
        assert findings_by_check["blocks"]["said"] == "all 8 blocks of demo are served, by 2 nodes"
    with contextlib.closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        status, findings_by_check = await run_doctor("--registry", f"127.0.0.1:{unused.getsockname()[1]}")
    assert status == 1
    assert "no answer from" in findings_by_check["registry"]["said"]
