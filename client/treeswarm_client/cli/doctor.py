"""`swarm doctor`: checks whether this machine can use a swarm, and says what to do if not."""

import argparse
import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from treeswarm.errors import MissingBlocks, SwarmError
from treeswarm.extras import install_command, missing_modules
from treeswarm.identity import config_digest
from treeswarm.model_files import HubOptions, load_tokenizer, read_config, resolve_model
from treeswarm.programs.health import Finding, check_free_space, check_open_files, check_python_version
from treeswarm.programs.health_report import print_findings
from treeswarm.programs.interrupts import SLOW_S, ticking
from treeswarm.programs.process import run_until_terminated
from treeswarm.programs.swarm_health import examine_swarm, peers_opener
from treeswarm.protocol.records import NodeRecord
from treeswarm.protocol.spans import missing_blocks
from treeswarm.registry import client_registry, registry_kind
from treeswarm.transport.tls import Security
from treeswarm_client.cli.checks import check_route
from treeswarm_client.cli.flags import add_revision_flag, add_route_flags, security_of
from treeswarm_client.discovery.overview import clean

EXAMPLES = """examples:
  swarm doctor                                             is this machine ready for use?
  swarm doctor --registry 203.0.113.7:4001                 can this machine use that swarm?
  swarm doctor --registry 203.0.113.7:4001 --model demo    and this model?
  swarm doctor --peers 127.0.0.1:4001 --json               for programs

Exit status: 1 if a check fails, else 0.  For a machine that is to host a node, run `swarm-node doctor`."""
# Number of open files that a client needs: it has two connections to each node of its routes.
FILES = 256
# A draft model of half a billion parameters in 16 bits takes about as much.
LEAST_SPACE = 1e9
GATEWAY_PORT = 8000
NOT_COMPARED = Finding.ok("clock", "not compared: this needs a swarm, named by --registry HOST:PORT")
NO_SWARM = Finding.ok("swarm", "not asked: none is named; `swarm demo` shows one on this machine")


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `swarm doctor` to the command line."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine and its connection to a swarm",
        description="Check this machine and its connection to a swarm, and say what to do about each problem.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_route_flags(parser)
    parser.add_argument(
        "--model", help="check this model too: directory, GGUF file, hub id, `smollm2` or `demo` (default: none)"
    )
    add_revision_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    named = args.peers is not None or args.registry is not None
    checks = run_checks(check_route(args) if named else None, args.model, security_of(args).swarm_key, args.revision)
    with ticking("checking", SLOW_S):
        findings = run_until_terminated(checks)
    return print_findings(Console(highlight=False), findings, as_json=args.json)


async def run_checks(
    spec: str | None, model: str | None = None, swarm_key: bytes | None = None, revision: str | None = None
) -> list[Finding]:
    """Run all checks for a client of the swarm at `spec`, or of this machine alone if that is None.

    Raises BadRequest for an invalid `spec`.
    """
    files = check_open_files(FILES)
    findings = [check_python_version(), *([files] if files else []), check_drafting(), check_serving()]
    findings += [await asyncio.to_thread(check_cache), check_gateway_port()]
    digest = None
    if model is not None:
        try:
            digest = await asyncio.to_thread(_digest, model, revision)
            findings.append(Finding.ok("model", f"config and tokenizer of {model} are available"))
        except SwarmError as error:
            findings.append(Finding.of_error("model", error))
    if spec is None:
        return [*findings, NOT_COMPARED, NO_SWARM]
    # Imported here, so that a wrong command line is refused before gRPC is loaded.
    from treeswarm.transport.grpc import GrpcTransport  # noqa: PLC0415

    transport = GrpcTransport(security=Security(swarm_key=swarm_key))
    try:
        by_peers = registry_kind(spec) in ("peers", "static")
        opener = peers_opener(spec, digest, transport) if by_peers else lambda: client_registry(spec, digest, transport)
        health = await examine_swarm(opener, transport)
    finally:
        await transport.close()
    return [*findings, *health.findings, *check_blocks(health.online)]


def check_blocks(online: Sequence[NodeRecord]) -> list[Finding]:
    """Check for each model that is served whether every block of it is.  Pure."""
    findings = []
    for digest in dict.fromkeys(record.model for record in online):
        records = [record for record in online if record.model == digest]
        name, total = clean(records[0].name), records[0].blocks
        gaps = missing_blocks([record.span for record in records], total)
        if gaps:
            step = f"start a node for them: swarm-node {name}; or wait with --patience until a node serves them"
            findings.append(Finding.fail("blocks", f"of {name}, {MissingBlocks.phrase(gaps, total)}", step))
        else:
            findings.append(Finding.ok("blocks", f"all {total} blocks of {name} are served, by {len(records)} nodes"))
    return findings


def check_drafting() -> Finding:
    """Check whether draft models can run on this machine."""
    if not missing_modules("draft"):
        return Finding.ok("drafting", "torch is installed: --draft may name a model")
    return Finding.ok("drafting", f"torch is missing: use --draft ngram; for draft models, {install_command('draft')}")


def check_serving() -> Finding:
    """Check whether this machine can run the gateway."""
    if not missing_modules("serve"):
        return Finding.ok("serving", "`swarm serve` can run here")
    return Finding.ok("serving", f"`swarm serve` cannot run here; if you want it, {install_command('serve')}")


def check_cache() -> Finding:
    """Check the free space where models of the hub are kept: a client keeps configs, tokenizers and draft models."""
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415  # reads the user's settings when imported

    step = "free some space, or keep models elsewhere: set HF_HOME=/path/with/space in this program's environment"
    return check_free_space(Path(HF_HUB_CACHE), needed=LEAST_SPACE, enough=LEAST_SPACE, next_step=step)


def check_gateway_port() -> Finding:
    """Check whether the port that `swarm serve` listens on by default is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", GATEWAY_PORT))
        except OSError as error:
            step = "for `swarm serve`, end the program that uses it, or give --listen HOST:PORT"
            return Finding.warn("port", f"127.0.0.1:{GATEWAY_PORT} cannot be used: {error.strerror}", step)
    return Finding.ok("port", f"127.0.0.1:{GATEWAY_PORT} is free for `swarm serve`")


def _digest(model: str, revision: str | None) -> str:
    """Return the config digest of a model after reading its tokenizer.  Raises ModelError."""
    folder = resolve_model(model, hub=HubOptions(revision))
    load_tokenizer(folder)
    return config_digest(read_config(folder))
