"""Starts a real `swarm serve` process for tests, in front of real nodes."""

import asyncio
import contextlib
import re
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
from openai import AsyncOpenAI

START_S = 120.0
KEY = "sk-a-key-for-tests"


@dataclass(frozen=True)
class Gateway:
    """One gateway process and its address."""

    process: asyncio.subprocess.Process
    url: str

    def openai(self, key: str = KEY) -> AsyncOpenAI:
        """Return the real OpenAI client, without retries that would hide failures."""
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    async def metrics(self) -> dict[str, float]:
        """Return every sample that Prometheus would read, by name and labels."""
        async with httpx2.AsyncClient() as http:
            answer = await http.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
        lines = [line.rpartition(" ") for line in answer.text.splitlines() if line and line[0] != "#"]
        return {name: float(value) for name, _, value in lines}


@contextlib.asynccontextmanager
async def gateway(nodes: str, *flags: str, named_by: str = "--peers") -> AsyncIterator[Gateway]:
    """Start a gateway, wait until it listens, and end it with SIGTERM.  Fails if it does not end with status 0.

    `named_by` is the flag that takes `nodes`.
    """
    program = Path(sys.executable).with_name("swarm")
    process = await asyncio.create_subprocess_exec(
        *(program, "serve", "--model", "demo", named_by, nodes, "--listen", "127.0.0.1:0", *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors = asyncio.create_task(process.stderr.read())
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), START_S)).decode()
        url = re.search(r"http://\S+?:\d+", line)
        assert url is not None, (await errors).decode()
        yield Gateway(process, url[0])
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), START_S)
        stderr = (await errors).decode()
        assert process.returncode == 0, stderr
        assert "Traceback" not in stderr, stderr
        assert stderr.endswith("stopped\n"), stderr
