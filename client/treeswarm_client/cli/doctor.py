"""`swarm doctor`: whether this machine reaches a swarm, and what to do where not."""

import argparse
import asyncio
import importlib.util
from collections.abc import Sequence

from rich.console import Console

from treeswarm.errors import MissingBlocks, SwarmError
from treeswarm.identity import config_digest
from treeswarm.model_files import HubOptions, load_tokenizer, read_config, resolve_model
from treeswarm.programs.health import Finding, check_open_files, check_python_version
from treeswarm.programs.health_report import print_findings
from treeswarm.programs.swarm_health import examine_swarm, peers_opener
from treeswarm.protocol.records import NodeRecord
from treeswarm.protocol.spans import missing_blocks
from treeswarm.registry import client_registry, registry_kind
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.tls import Security
from treeswarm_client.cli.flags import add_revision_flag, add_route_flags, registry_of, security_of
from treeswarm_client.discovery.overview import clean

EXAMPLES = """examples:
  swarm doctor --registry 203.0.113.7:4001                 can this machine use that swarm?
  swarm doctor --registry 203.0.113.7:4001 --model demo    and this model?
  swarm doctor --peers 127.0.0.1:4001 --json               for programs

Exit status 1 where something fails, else 0.  Of a machine that is to serve: swarm-node doctor."""
# A client has two connections to each node of its routes.
FILES = 256


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    made = commands.add_parser(
        "doctor",
        help="what would go wrong here, and what to do about it",
        description="Check this machine and its way to a swarm.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_route_flags(made)
    made.add_argument("--model", help="whether it can be used: directory, hub id or `demo` (default: not checked)")
    add_revision_flag(made)
    made.add_argument("--json", action="store_true", help="one JSON object")
    made.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    findings = asyncio.run(run_checks(registry_of(args), args.model, security_of(args).swarm_key, args.revision))
    return print_findings(Console(highlight=False), findings, as_json=args.json)


async def run_checks(
    spec: str, model: str | None = None, swarm_key: bytes | None = None, revision: str | None = None
) -> list[Finding]:
    """All checks of a client of the swarm at `spec`.  Raises BadRequest where `spec` is none."""
    files = check_open_files(FILES)
    found = [check_python_version(), *([files] if files else []), check_drafting()]
    digest = None
    if model is not None:
        try:
            digest = await asyncio.to_thread(_digest, model, revision)
            found.append(Finding.ok("model", f"config and tokenizer of {model} are here"))
        except SwarmError as error:
            found.append(Finding.of_error("model", error))
    transport = GrpcTransport(security=Security(swarm_key=swarm_key))
    try:
        asked = registry_kind(spec) in ("peers", "static")
        opening = peers_opener(spec, digest, transport) if asked else lambda: client_registry(spec, digest, transport)
        seen = await examine_swarm(opening, transport)
    finally:
        await transport.close()
    return [*found, *seen.findings, *blocks(seen.online)]


def blocks(online: Sequence[NodeRecord]) -> list[Finding]:
    """Of each model that is served, whether all of it is.  Pure."""
    found = []
    for digest in dict.fromkeys(record.model for record in online):
        of_it = [record for record in online if record.model == digest]
        name, total = clean(of_it[0].name), of_it[0].blocks
        gaps = missing_blocks([record.span for record in of_it], total)
        if gaps:
            step = f"start a node for them: swarm-node {name}; or wait, with --patience, until somebody does"
            found.append(Finding.fail("blocks", f"of {name}, {MissingBlocks.phrase(gaps, total)}", step))
        else:
            found.append(Finding.ok("blocks", f"all {total} of {name} are served, by {len(of_it)} nodes"))
    return found


def check_drafting() -> Finding:
    """Whether draft models can run here."""
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        return Finding.ok("drafting", "torch is here: --draft may name a model")
    return Finding.ok("drafting", "without torch: --draft ngram; after pip install 'treeswarm[draft]' a model, too")


def _digest(model: str, revision: str | None) -> str:
    """Raises ModelError."""
    folder = resolve_model(model, hub=HubOptions(revision))
    load_tokenizer(folder)
    return config_digest(read_config(folder))
