"""Nodes and clients join a private swarm by one code, without its key they are told so, and killed nodes come back."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.support.swarm_keys import new_swarm_key

from treeswarm.errors import BadRequest, ModelError
from treeswarm.keys import read_swarm_key
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import LocalNode, LocalSwarm, local_swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")
BIN = Path(sys.executable).parent


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalSwarm]:
    """Run the first node of a private swarm, and one that joins by its code; each hosts one half of the model."""
    key = tmp_path_factory.mktemp("key") / "swarm.key"
    key.write_text(new_swarm_key())
    key.chmod(0o600)
    flags = ("--num-blocks", "4", "--grace", "0")
    async with local_swarm("demo", [], swarm_key=key, registry="dht:", flags=flags) as running:
        first = await running.start()
        await running.start("--registry", first.ready["code"])
        yield running


def key_of(swarm: LocalSwarm) -> Path:
    return Path(swarm.flags[swarm.flags.index("--swarm-key") + 1])


async def run_program(name: str, *arguments: str | Path) -> tuple[int | None, str, str]:
    """Return exit status, standard output and standard error."""
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(BIN / name, *arguments, **pipes)
    output, errors = await asyncio.wait_for(process.communicate(), 120)
    return process.returncode, output.decode(), errors.decode()


async def kill(node: LocalNode) -> None:
    node.process.send_signal(signal.SIGKILL)
    await node.process.wait()


async def test_killed_first_node_returns_to_its_swarm_at_its_addresses(swarm: LocalSwarm) -> None:
    first, second = swarm.nodes
    identity = swarm.identity(0)
    async with asyncio.timeout(60):
        while not re.search(r"/p2p/", identity.with_name(f"{identity.name}.state").read_text()):
            await asyncio.sleep(0.2)  # it has yet to write down who joined it
    await kill(first)
    owner = ("--identity", identity, "--swarm-key", key_of(swarm))
    status, _, errors = await run_program("swarm-node", "pause", *owner)
    assert (status, "no node of yours runs here" in errors) == (1, True), errors
    again = await swarm.start("--identity", str(identity))
    same = ("address", "pinned", "node", "code", "join", "blocks")
    assert {name: again.ready[name] for name in same} == {name: first.ready[name] for name in same}
    assert again.ready["registry"].split(",")[0] == first.ready["registry"].split(",")[0]
    key = read_swarm_key(key_of(swarm))
    async with SwarmClient(model="demo", registry=again.ready["code"], tree_size=0, swarm_key=key) as client:
        text = await client.generate("x", max_new_tokens=3, ignore_eos=True)
    assert {hop.address for hop in text.chain.hops} == {again.pinned, second.pinned}
    status, reply, errors = await run_program("swarm-node", "resume", *owner)
    assert (status, "serves" in reply) == (0, True), errors


@pytest.mark.skipif(os.name != "posix", reason="file modes")
async def test_only_the_owner_reads_a_node_s_files(swarm: LocalSwarm) -> None:
    identity = swarm.identity(0)
    modes = {f"{path.name}": path.stat().st_mode & 0o777 for path in identity.parent.glob(f"{identity.name}*")}
    assert modes.pop(f"{identity.name}.lock", 0) & 0o600
    assert modes == {identity.name: 0o600, f"{identity.name}.dht": 0o600, f"{identity.name}.state": 0o600}


async def test_programs_take_the_code_in_any_letters_and_want_its_key(swarm: LocalSwarm) -> None:
    code = swarm.nodes[1].ready["code"]
    assert swarm.nodes[1].ready["join"] == code
    command = ("swarm", "models", "--registry", code.upper(), "--swarm-key", key_of(swarm))
    async with asyncio.timeout(60):
        while (await run_program(*command))[0] != 0:
            pass  # the record of the node that was resumed is on its way
    status, output, _ = await run_program(*command)
    assert (status, output.splitlines()[1].split()[:3]) == (0, ["demo", "8", "complete"])
    async with asyncio.timeout(5):  # nothing is dialled
        with pytest.raises(BadRequest, match=r"private swarm, and no key is given: ask the person.*--swarm-key PATH"):
            async with SwarmClient(model="demo", registry=code, tree_size=0):
                pass
    status, _, errors = await run_program("swarm-node", "demo", "--registry", code)
    assert (status, "private swarm, and no key is given" in errors) == (1, True), errors


async def test_node_without_the_key_is_refused_and_both_sides_say_so(swarm: LocalSwarm) -> None:
    """The DHT admits it, as anyone.  The nodes do not, so that it would be ready, and alone for ever."""
    async with local_swarm("demo", [], registry=swarm.nodes[1].ready["registry"]) as outside:
        with pytest.raises(ModelError, match=r"refuse this one: this is a private swarm.* no swarm key: ask a member"):
            await outside.start()
    second = swarm.nodes.pop(1)
    second.process.terminate()
    errors = (await second.errors).decode()
    assert errors.count("refused 127.0.0.1: this is a private swarm, and the caller has no swarm key") == 1
