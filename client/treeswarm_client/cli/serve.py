"""`swarm serve`: a swarm behind the HTTP interface of OpenAI."""

import argparse
import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from treeswarm.errors import BadRequest
from treeswarm.programs.settings import add_config_flag
from treeswarm.protocol.address import Address
from treeswarm_client.cli.flags import add_client_flags, client_of

EXAMPLES = """examples:
  swarm serve --model demo --registry 127.0.0.1:4001          on http://127.0.0.1:8000, for this machine alone
  swarm serve --model Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B --registry host-a:4001 \\
        --listen 0.0.0.0:8000 --api-key-file keys.txt         for others, who need one of the keys

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "demo", "messages": [{"role": "user", "content": "def main("}]}'
  OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python -c 'import openai; print(openai.models.list())'

  every flag can also be a variable such as TREESWARM_MAX_CONCURRENT, or a line in the file given by --config

  http://127.0.0.1:8000/map/     who serves what, and trees as they grow
  http://127.0.0.1:8000/metrics  for Prometheus; /health and /ready for whoever watches over it"""

PATIENCE_S = 10.0
KEYS_VARIABLE = "TREESWARM_API_KEYS"


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    made = commands.add_parser(
        "serve",
        help="an OpenAI-compatible gateway, with a map and metrics",
        description="Serve a swarm's model over the HTTP interface that OpenAI's clients speak.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_client_flags(made, patience_s=PATIENCE_S)
    made.add_argument("--listen", default="127.0.0.1:8000", metavar="HOST:PORT", help="default 127.0.0.1:8000")
    made.add_argument(
        "--api-key-file", type=Path, metavar="PATH",
        help=f"keys that callers must send, one a line, # before remarks; more in {KEYS_VARIABLE}, by commas",
    )  # fmt: skip
    made.add_argument(
        "--served-model-name", action="append", metavar="NAME", help="what callers call the model (default: --model)"
    )
    made.add_argument("--max-concurrent", type=int, default=32, metavar="N", help="generations at once (default 32)")
    made.add_argument("--max-waiting", type=int, default=128, metavar="N", help="requests in line; more get 429 (128)")
    made.add_argument("--max-wait", type=float, default=30.0, metavar="SECONDS", help="in line, then 429 (default 30)")
    made.add_argument(
        "--default-max-tokens", type=int, default=1024, metavar="N", help="of a chat that names none (default 1024)"
    )
    made.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN", help="a web page that may ask")
    made.add_argument(
        "--map-text", action=argparse.BooleanOptionalAction, default=None,
        help="the map shows words, not only shapes of trees (default: only where no keys are set)",
    )  # fmt: skip
    made.add_argument("--log-requests", action="store_true", help="one line a request")
    add_config_flag(made, "serve")
    made.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        # The rest of `swarm` does without a web server.
        from treeswarm_client.gateway.backend import Backend  # noqa: PLC0415
        from treeswarm_client.gateway.config import ApiKeys, GatewayConfig, GatewayLimits  # noqa: PLC0415
        from treeswarm_client.gateway.server import run_gateway  # noqa: PLC0415
    except ImportError as error:
        raise BadRequest(f"swarm serve needs {error.name}: pip install 'treeswarm[serve]'") from None
    client_of(args)  # what is missing is told before anything starts
    keys = ApiKeys.of(read_keys(args.api_key_file, os.environ))
    limits = GatewayLimits(
        generations=args.max_concurrent,
        waiting=args.max_waiting,
        wait_s=args.max_wait,
        max_tokens=args.default_max_tokens,
    )
    config = GatewayConfig(
        model_names=tuple(args.served_model_name or [args.model]),
        listen=Address.parse(args.listen),
        keys=keys,
        cors_origins=tuple(args.cors_origin),
        map_text=not keys.digests if args.map_text is None else args.map_text,
        limits=limits,
    )
    return asyncio.run(
        run_gateway(
            Backend(config, lambda: client_of(args, concurrency=args.max_concurrent)), log_requests=args.log_requests
        )
    )


def read_keys(file: Path | None, environment: Mapping[str, str]) -> Sequence[str]:
    """All keys of a file and of the environment.  Raises BadRequest."""
    keys = [key for key in environment.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except OSError as error:
            raise BadRequest(f"the API keys in {file} cannot be read: {error.strerror}") from None
        found = [line.partition("#")[0].strip() for line in lines]
        if not any(found):
            raise BadRequest(f"{file} has no API key: write one a line")
        keys += [key for key in found if key]
    return [key.strip() for key in keys]
