"""`swarm train-speculator`: train what a tail proposes trees with."""

import argparse
import json
import sys
import time
from pathlib import Path

from treeswarm.errors import BadRequest
from treeswarm.extras import require
from treeswarm.identity import config_digest, weights_digest
from treeswarm.model_files import HubOptions, check_model_name, read_config, resolve_model
from treeswarm.programs.interrupts import interrupt_ends_process
from treeswarm_client.cli.checks import check_at_least
from treeswarm_client.cli.flags import add_revision_flag

EXAMPLES = """examples:
  swarm train-speculator smollm2 --out my-speculator               an hour on a CPU
  swarm train-speculator demo --out demo-head --prompts text    the bundled model, which continues code
  swarm-node smollm2 --speculator my-speculator                    serve it
  swarm generate "…" --model smollm2 --draft tail+ngram --registry CODE

An interrupted training goes on when the same command is given again."""
KINDS = ("autoregressive", "mlp", "lattice", "parallel")
"""Names of the kinds in `kinds/table.py`, which imports torch."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `swarm train-speculator` to the command line."""
    parser = commands.add_parser(
        "train-speculator",
        help="train a head that guesses a model's next tokens beside its last block",
        description="Let a model write texts, and train a head on its hidden states that guesses its next tokens.\n"
        "The files are a JSON config and weights as safetensors, for `swarm-node --speculator`.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="the target: model directory, GGUF file, hub id, smollm2 or demo"
    )
    add_revision_flag(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the speculator (required)")
    parser.add_argument(
        "--minutes", type=float, default=60.0, metavar="N", help="minutes to take, of all threads on a CPU (default 60)"
    )
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default=KINDS[0],
        help="what to train: nodes serve autoregressive (default) and parallel, `swarm bench speculators` compares all",
    )
    parser.add_argument(
        "--prompts",
        choices=["auto", "chat", "text"],
        default="auto",
        help="what the model writes its own texts from: questions, or beginnings of texts; auto (default): questions "
        "if it has a chat template",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="file, or folder of .txt, .md and .py files, to learn from (may be repeated; default: the source of "
        "Python's standard library)",
    )
    parser.add_argument(
        "--taps", metavar="N,M", help="blocks whose results the head reads (default: the last three of the model)"
    )
    parser.add_argument("--window", type=int, default=256, metavar="N", help="tokens the head attends to (default 256)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default), a GPU if there is one")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="dtype of the target; the head is trained in float32 (default auto, as nodes choose it)",
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch chooses)")
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="the same seed trains the same head (default 1)"
    )
    parser.add_argument("--json", action="store_true", help="print the speculator's config at the end")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    with interrupt_ends_process():
        check_model_name(args.model)
        check_at_least("--window", args.window, 32)
        if not 0 < args.minutes < 1e5:
            raise BadRequest(f"--minutes {args.minutes:g} is no time to train in: give some minutes, such as 60")
        taps = _taps(args.taps)
        require("node", "swarm train-speculator")
        config = _train(args, taps)
    if args.json:
        print(json.dumps(config))
    else:
        print(f"serve it with: swarm-node {args.model} --speculator {args.out}")
    return 0


def _taps(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")})) if text else ()
    except ValueError:
        raise BadRequest(f"--taps {text} are no blocks: give numbers such as 5,6,7") from None


def _train(args: argparse.Namespace, taps: tuple[int, ...]) -> dict[str, object]:
    """Train, and return the speculator's config.  Imports torch, which takes seconds."""
    from dataclasses import asdict  # noqa: PLC0415

    import torch  # noqa: PLC0415

    from treeswarm.programs.devices import (  # noqa: PLC0415
        checkpoint_dtype,
        choose_device,
        choose_dtype,
        describe_machine,
    )
    from treeswarm_bench.speculators.samples import PromptSource, read_input_texts  # noqa: PLC0415
    from treeswarm_bench.speculators.target import TappedTarget  # noqa: PLC0415
    from treeswarm_bench.speculators.training import (  # noqa: PLC0415
        SpeculatorTraining,
        TargetIdentity,
        TrainingPlan,
    )
    from treeswarm_client.prompt_encoder import load_prompt_encoder  # noqa: PLC0415
    from treeswarm_node.model.checkpoint.text_part import tensors_to_load  # noqa: PLC0415

    if args.threads:
        torch.set_num_threads(args.threads)
    folder = resolve_model(args.model, weights=True, hub=HubOptions(args.revision))
    model_config, machine = read_config(folder), describe_machine(torch)
    device = choose_device(args.device, machine).name
    dtype = choose_dtype(args.dtype, device, machine, checkpoint_dtype(model_config))[0]
    encoder = load_prompt_encoder(args.model, folder)
    chats = encoder.chat is not None if args.prompts == "auto" else args.prompts == "chat"
    texts = read_input_texts(encoder, args.texts)
    target = TappedTarget.load(folder, taps, device, dtype)
    print(f"the target computes on {device} in {dtype}; taps at blocks {target.taps}", file=sys.stderr)
    identity = TargetIdentity(
        config_digest(model_config), weights_digest(folder, model_config, is_loaded=tensors_to_load(folder))
    )
    threads = torch.get_num_threads()
    # On a CPU, time that other programs take does not count: a busy machine takes longer, and trains as much.
    clock = time.monotonic if device != "cpu" else lambda: time.process_time() / threads
    training = SpeculatorTraining(
        target,
        identity,
        texts,
        PromptSource(encoder, texts, chats),
        TrainingPlan(args.seed, args.minutes, args.window, target.taps, chats, args.kind),
        args.out,
        lambda line: print(line, file=sys.stderr, flush=True),
        clock,
    )
    return asdict(training.run())
