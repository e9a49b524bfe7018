"""`swarm serve`: a gateway that serves a swarm's model over OpenAI's HTTP API."""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from treeswarm.errors import BadRequest
from treeswarm.extras import require
from treeswarm.programs.interrupts import STOPPED, interrupt_ends_process, write_line
from treeswarm.programs.process import run_until_terminated
from treeswarm.programs.settings import add_config_flag
from treeswarm.protocol.address import Address
from treeswarm_client.cli.checks import check_at_least, check_client_flags
from treeswarm_client.cli.flags import (
    OPENING,
    add_client_flags,
    add_generation_config_flag,
    client_of,
    report_served_models,
    show_progress,
)
from treeswarm_client.cli.render.draft_offer import offer_draft
from treeswarm_client.tool_calls.formats import AUTO, CALL_FORMAT_NAMES, NONE, REASONING_FORMAT_NAMES

if TYPE_CHECKING:
    from treeswarm_client.gateway.config import GatewayConfig

EXAMPLES = """examples:
  swarm serve --model demo --registry 127.0.0.1:4001          on http://127.0.0.1:8000, for this machine only
  swarm serve --model Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B --registry host-a:4001 \\
        --listen 0.0.0.0:8000 --api-key-file keys.txt         for other machines, with API keys

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "demo", "messages": [{"role": "user", "content": "def main("}]}'
  OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python -c 'import openai; print(openai.models.list())'

Every flag can also be given as an environment variable, such as TREESWARM_MAX_CONCURRENT, or in the --config file.

  http://127.0.0.1:8000/         a page to chat on; /docs for every route, with programs to copy
  http://127.0.0.1:8000/map/     the nodes, their blocks, and draft trees as they grow
  http://127.0.0.1:8000/metrics  metrics for Prometheus; /health and /ready for supervisors"""

PATIENCE_S = 10.0
KEYS_VARIABLE = "TREESWARM_API_KEYS"


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `swarm serve` to the command line."""
    parser = commands.add_parser(
        "serve",
        help="run an OpenAI-compatible gateway, with a map and metrics",
        description="Serve a swarm's model over OpenAI's HTTP API.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_client_flags(parser, patience_s=PATIENCE_S)
    parser.add_argument(
        "--listen", default="127.0.0.1:8000", metavar="HOST:PORT", help="address to listen on (default 127.0.0.1:8000)"
    )
    parser.add_argument(
        "--api-key-file", type=Path, metavar="PATH",
        help=f"file with the API keys that callers may use, one per line, # starts a comment; further keys in "
        f"{KEYS_VARIABLE}, separated by commas",
    )  # fmt: skip
    parser.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="name of the model for callers (default: --model; may be repeated)",
    )
    parser.add_argument(
        "--max-concurrent", type=int, default=32, metavar="N", help="number of generations at once (default 32)"
    )
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=128,
        metavar="N",
        help="number of requests that may wait; more get status 429 (default 128)",
    )
    parser.add_argument(
        "--max-wait",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="seconds a request waits before it gets status 429 (default 30)",
    )
    parser.add_argument(
        "--default-max-tokens",
        type=int,
        metavar="N",
        help="max_tokens of a chat request without it (default: what fits into the model's context, at most an eighth "
        "of the room that is free on the nodes)",
    )
    add_generation_config_flag(parser)
    parser.add_argument(
        "--tool-parser", default=AUTO, choices=(AUTO, NONE, *CALL_FORMAT_NAMES), metavar="NAME",
        help="format of the model's tool calls (default: the one that its chat template shows); hermes describes tools "
        "in the system message where the template leaves them out; none reads no calls",
    )  # fmt: skip
    parser.add_argument(
        "--reasoning-parser", default=AUTO, choices=(AUTO, NONE, *REASONING_FORMAT_NAMES), metavar="NAME",
        help="format of the model's thinking (default: the one that its chat template shows); none leaves it in texts",
    )  # fmt: skip
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin of a web page that may call the gateway (may be repeated)",
    )
    parser.add_argument(
        "--map-text", action=argparse.BooleanOptionalAction, default=None,
        help="show the text on the map, not only the shapes of trees (default: only without API keys)",
    )  # fmt: skip
    parser.add_argument("--log-requests", action="store_true", help="log one line per request")
    add_config_flag(parser, "serve")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    with interrupt_ends_process():
        config = _checked_config(args)
        with report_served_models(args):
            offer_draft(args)
        # Imported here, because the other commands need no web server.
        from treeswarm_client.gateway.backend import Backend  # noqa: PLC0415
        from treeswarm_client.gateway.server import run_gateway  # noqa: PLC0415
    # The gateway listens at once, and looks for the nodes in the background.
    backend = Backend(config, lambda: client_of(args, concurrency=args.max_concurrent, opening_patience=0.0))
    serving = run_gateway(backend, log_requests=args.log_requests, while_opening=lambda: show_progress(OPENING))
    status = run_until_terminated(serving)
    write_line(STOPPED)
    return status


def _checked_config(args: argparse.Namespace) -> "GatewayConfig":
    """Return the gateway's settings, once everything that can be checked without the swarm is right."""
    check_client_flags(args)
    check_at_least("--max-concurrent", args.max_concurrent, 1)
    check_at_least("--default-max-tokens", args.default_max_tokens, 1)
    check_at_least("--max-waiting", args.max_waiting, 0)
    if not 0.0 <= args.max_wait < math.inf:
        raise BadRequest(f"--max-wait is {args.max_wait:g}: give the seconds to wait, 0 or more")
    listen, api_keys = Address.parse(args.listen), read_keys(args.api_key_file, os.environ)
    require("serve", "swarm serve")
    from treeswarm_client.gateway.config import ApiKeys, GatewayConfig, GatewayLimits  # noqa: PLC0415

    keys = ApiKeys.of(api_keys)
    limits = GatewayLimits(
        generations=args.max_concurrent,
        waiting=args.max_waiting,
        wait_s=args.max_wait,
        max_tokens=args.default_max_tokens,
    )
    return GatewayConfig(
        model_names=tuple(args.served_model_name or [args.model]),
        listen=listen,
        keys=keys,
        cors_origins=tuple(args.cors_origin),
        map_text=not keys.digests if args.map_text is None else args.map_text,
        limits=limits,
        tool_parser=args.tool_parser,
        reasoning_parser=args.reasoning_parser,
        model_defaults=args.generation_config == "auto",
    )


def read_keys(file: Path | None, environment: Mapping[str, str]) -> Sequence[str]:
    """Return all API keys of the file and of the environment.  Raises BadRequest."""
    keys = [key for key in environment.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except OSError as error:
            raise BadRequest(f"the API keys in {file} cannot be read: {error.strerror}") from None
        values = [line.partition("#")[0].strip() for line in lines]
        if not any(values):
            raise BadRequest(f"{file} has no API key: write one per line")
        keys += [key for key in values if key]
    return [key.strip() for key in keys]
