"""The flags of `swarm bench`, which its benches share."""

import argparse
from pathlib import Path

from treeswarm_client.cli.flags import add_swarm_key_flag, parse_tree_size


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags of all benches."""
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE.json", help="draw: output of wan --json")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.svg", help="draw: file to write, .svg or .png (needs the extra `plot`)"
    )
    _add_model_flags(parser)
    _add_matrix_flags(parser)
    _add_flags_of_single_benches(parser)
    add_swarm_key_flag(parser)
    _add_place_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="target: directory, hub id or demo (default)")
    parser.add_argument("--draft", help="draft model (default demo-draft; wan and virtual-wan: auto)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default float32"
    )
    parser.add_argument(
        "--widen",
        type=int,
        default=1,
        metavar="N",
        help="batch, offload: multiply the weights of the feed-forwards, with the same text (default 1)",
    )
    parser.add_argument(
        "--quantization",
        choices=["int8", "int4", "nf4"],
        help="batch: format of the nodes' weights (default: as they are)",
    )
    parser.add_argument(
        "--speculator",
        default="auto",
        metavar="DIR",
        help="proposals, speculators: folder that swarm train-speculator wrote; several with commas in speculators",
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="number of node processes (default 3; offload: 1)")
    parser.add_argument(
        "--prompts",
        type=int,
        metavar="N",
        help="number of held-out prompts (default 8; exact: 20, sampling: 16; of each text, wan: 3, virtual-wan: 4; "
        "texts per case, disturbed: 2)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="tokens per prompt (default 64; exact: 128, faults: 96, wan: 20, virtual-wan: 32)",
    )


def _add_matrix_flags(parser: argparse.ArgumentParser) -> None:
    for name, choices, more in (
        ("cells", "1ms,25ms,50ms,100ms,slow-node", "; proposals: default 25ms"),
        ("texts", "code,prose,copying,zero", "; chat asks a chat model questions, in exact and proposals too"),
    ):
        parser.add_argument(
            f"--{name}", type=_words, metavar="A,B", help=f"wan, virtual-wan: some of {choices} (default all){more}"
        )
    parser.add_argument(
        "--cases",
        type=lambda text: text.split(";"),
        metavar="A;B",
        help="disturbed: some of its faults, such as 'noise;cold nodes 5x' (default all); it takes --cells of 1ms, "
        "25ms, 100ms and --texts of good, poor, changing",
    )
    parser.add_argument(
        "--strategies", type=_words, metavar="A,B", help="wan, virtual-wan: such as plain,tree-64,auto (default all)"
    )
    parser.add_argument(
        "--temperatures",
        type=_decimals,
        metavar="A,B",
        help="wan, virtual-wan, proposals: default 0,1; sampling: default 0.3,0.7,1",
    )
    parser.add_argument(
        "--swift",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="virtual-wan: nodes so many times as fast as this machine (default 1)",
    )
    parser.add_argument(
        "--flat-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="proposals: milliseconds of a node's forward whatever its rows (default: as on this machine)",
    )
    parser.add_argument(
        "--tree-size",
        type=parse_tree_size,
        default=64,
        metavar="N",
        help="wan with --lab or --peers: number of nodes per tree, or auto (default 64)",
    )
    parser.add_argument(
        "--sizes",
        type=_numbers,
        metavar="N,M",
        help="exact, trees, proposals, sampling, offload: tree sizes, such as 8,64",
    )


def _add_flags_of_single_benches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--generations", type=int, default=100, metavar="N", help="faults: number of generations (default 100)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="busy, faults, grammars, heal, disturbed: first seed (default 0)",
    )
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="heal: number of kills (default 20)")
    parser.add_argument(
        "--registry-kind", choices=["dht", "mqtt"], default="dht", help="heal: registry of the nodes (default dht)"
    )
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="busy: number of demos (default 20)")
    parser.add_argument("--load", choices=["loops", "bursts"], default="loops", help="busy: what runs beside them")
    parser.add_argument(
        "--programs", type=int, default=8, metavar="N", help="busy: number of loops, or of bursts at a time (default 8)"
    )
    parser.add_argument("--clients", type=int, default=64, metavar="N", help="load: number of clients (default 64)")
    parser.add_argument(
        "--messages", type=int, default=10_000, metavar="N", help="fuzz: number of hostile messages (default 10000)"
    )
    parser.add_argument("--rounds", type=int, default=300, metavar="N", help="node: number of appends (default 300)")
    parser.add_argument(
        "--profile", action="store_true", help="node: print where the event loop spends its time, to standard error"
    )
    parser.add_argument("--device", default="cpu", help="attention: cpu, cuda, … (default cpu)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="attention: threads on a CPU (default 1)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="attention: seconds per case, of 16 (default 2)"
    )


def _add_place_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="wan with --lab or --peers: cut prompts to N tokens (default 128)",
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--peers", help="overhead, wan: nodes that run already, HOST:PORT,HOST:PORT")
    place.add_argument(
        "--lab",
        metavar="LINK",
        help="overhead, wan, ports: a network namespace per node, such as delay=25ms,rate=100mbit (root, Linux)",
    )
    parser.add_argument(
        "--congestion",
        help="overhead and wan with --lab: TCP's cubic, reno or bbr (default: the system's choice)",
    )
    parser.add_argument(
        "--beside", action="store_true", help="ports with --lab: the client is on the host that lends the port"
    )


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _decimals(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
