"""`swarm doctor`: checks whether this machine can use a swarm, and says what to do if not."""

import argparse
import asyncio
from collections.abc import Sequence

from rich.console import Console

from treeswarm.errors import MissingBlocks, SwarmError
from treeswarm.extras import install_command, missing_modules
from treeswarm.identity import config_digest
from treeswarm.model_files import HubOptions, load_tokenizer, read_config, resolve_model
from treeswarm.programs.health import Finding, check_open_files, check_python_version
from treeswarm.programs.health_report import print_findings
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
  swarm doctor --registry 203.0.113.7:4001                 can this machine use that swarm?
  swarm doctor --registry 203.0.113.7:4001 --model demo    and this model?
  swarm doctor --peers 127.0.0.1:4001 --json               for programs

Exit status: 1 if a check fails, else 0.  For a machine that is to host a node, run `swarm-node doctor`."""
# Number of open files that a client needs: it has two connections to each node of its routes.
FILES = 256


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
    parser.add_argument("--model", help="check this model too: directory, hub id or `demo` (default: none)")
    add_revision_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    checks = run_checks(check_route(args), args.model, security_of(args).swarm_key, args.revision)
    findings = run_until_terminated(checks)
    return print_findings(Console(highlight=False), findings, as_json=args.json)


async def run_checks(
    spec: str, model: str | None = None, swarm_key: bytes | None = None, revision: str | None = None
) -> list[Finding]:
    """Run all checks for a client of the swarm at `spec`.  Raises BadRequest for an invalid `spec`."""
    files = check_open_files(FILES)
    findings = [check_python_version(), *([files] if files else []), check_drafting()]
    digest = None
    if model is not None:
        try:
            digest = await asyncio.to_thread(_digest, model, revision)
            findings.append(Finding.ok("model", f"config and tokenizer of {model} are available"))
        except SwarmError as error:
            findings.append(Finding.of_error("model", error))
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


def _digest(model: str, revision: str | None) -> str:
    """Return the config digest of a model after reading its tokenizer.  Raises ModelError."""
    folder = resolve_model(model, hub=HubOptions(revision))
    load_tokenizer(folder)
    return config_digest(read_config(folder))
