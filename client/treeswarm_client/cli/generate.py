"""`swarm generate`: continues one prompt, or several side by side."""

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from treeswarm.errors import BadRequest, SwarmError
from treeswarm.programs.interrupts import interrupt_ends_process
from treeswarm.programs.process import printable, run_until_terminated
from treeswarm.protocol.messages import NumericsClass
from treeswarm_client.cli.checks import check_at_least, check_client_flags, check_prompt, check_sampling_flags
from treeswarm_client.cli.concurrent import PromptResult, generate_concurrently
from treeswarm_client.cli.flags import (
    add_client_flags,
    add_sampling_flags,
    open_client,
    report_served_models,
    sampling_of,
)
from treeswarm_client.cli.prompts import read_prompt, read_prompts
from treeswarm_client.cli.render.draft_offer import offer_draft
from treeswarm_client.cli.render.live import LiveText, escape_controls, stdout_console, summary_line
from treeswarm_client.cli.render.route_lines import driver_lines, route_lines
from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.route_dict import drivers_as_dict, route_as_dict
from treeswarm_client.generation.run import Run
from treeswarm_client.planner.explain import explain_lines

EXAMPLES = """examples:
  swarm generate "def main():" --model demo --peers 127.0.0.1:4001,127.0.0.1:4002 --draft demo-draft
  swarm generate "Once" --model ./Llama-3-8B --peers 10.0.0.5:4001,10.0.0.6:4001 --draft ./Llama-3.2-1B \\
        --temperature 0.7 --top-p 0.9 --seed 1 --max-new-tokens 300
  swarm generate "Twice" --model ./Llama-3-8B --peers 10.0.0.5:4001,10.0.0.6:4001 --draft ngram
  swarm generate "x =" --model demo --registry 203.0.113.7:4001 --show-route --patience 120
  swarm generate "x =" --model demo --peers 127.0.0.1:4001 --tree-size 0 --json | jq .stats
  git diff | swarm generate --model demo --registry 203.0.113.7:4001 > more.txt
  swarm generate --prompt-file story.txt --stop "THE END" --model demo --registry 203.0.113.7:4001
  swarm generate "x =" --n 4 --temperature 0.8 --model demo --registry 203.0.113.7:4001
  swarm generate --prompts-file prompts.txt --model demo --registry 203.0.113.7:4001 > answers.jsonl

The prompt is PROMPT, the contents of a file, or standard input (`-`, or no PROMPT at all).  One line end at the end of
a file or of standard input is removed.  On a terminal the prompt is shown before the new text; otherwise standard
output has the new text only."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `swarm generate` to the command line."""
    parser = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt with the text of the target model, token for token.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="text to continue; `-` reads standard input")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from this file")
    parser.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help='continue one prompt per line of this file; a .jsonl file has a JSON string or {"prompt": …} per line; '
        "the results are JSON lines in the same order",
    )
    add_client_flags(parser)
    add_sampling_flags(parser, max_new_tokens=128)
    parser.add_argument("--n", type=int, default=1, metavar="N", help="number of samples of each prompt (default 1)")
    parser.add_argument("--show-route", action="store_true", help="print the nodes used, and the repairs of the chain")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="print to stderr the tree of each traversal, the reason for its size, and the times",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per text instead of live text")
    parser.set_defaults(run=_command)


def _command(args: argparse.Namespace) -> int:
    with interrupt_ends_process():
        prompts = _checked_prompts(args)
    if args.n == 1 and args.prompts_file is None:
        return run_until_terminated(_generate_one(args, prompts[0]))
    return run_until_terminated(_generate_many(args, prompts))


def _checked_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts, once everything that can be checked without the swarm is right.

    A prompt of a file of prompts is checked in its turn: the others are answered all the same.
    """
    check_at_least("--n", args.n, 1)
    if args.prompts_file is not None and (args.prompt is not None or args.prompt_file is not None):
        raise BadRequest("--prompts-file replaces other prompts: leave PROMPT and --prompt-file out")
    if (args.show_route or args.explain) and (args.n > 1 or args.prompts_file is not None):
        raise BadRequest("--show-route and --explain work for a single text only: leave --n and --prompts-file out")
    check_client_flags(args)
    check_sampling_flags(args)
    if args.prompts_file is not None:
        prompts = read_prompts(args.prompts_file, sys.stdin)
    else:
        prompts = [read_prompt(args.prompt, args.prompt_file, sys.stdin)]
    with report_served_models(args):
        if args.prompts_file is None:
            check_prompt(args, prompts[0])
        offer_draft(args)
    return prompts


async def _generate_one(args: argparse.Namespace, prompt: str) -> int:
    async with open_client(args) as client:
        run = client.stream(prompt, **sampling_of(args, client.generation_defaults))
        try:
            if args.json:
                return await _print_json(run, client)
            return await _print_live(prompt, run, client.target.numerics, show_route=args.show_route)
        finally:
            if args.explain:
                print(*driver_lines(run), *explain_lines(run.recorder.reports), sep="\n", file=sys.stderr)


async def _print_live(prompt: str, run: Run, numerics: NumericsClass, *, show_route: bool) -> int:
    console = stdout_console()
    notes = console if console.is_terminal else Console(highlight=False, stderr=True)
    live = LiveText(console)
    if console.is_terminal:
        live.prompt(prompt)
    try:
        async for token in run:
            live.token(token)
    finally:
        live.end()
        if run.stats is not None and run.stats.traversals:
            notes.print(summary_line(run.stats), soft_wrap=not notes.is_terminal)
            if not numerics.plain:
                notes.print(f"computed with {numerics}: the published weights may give another text", style="dim")
        if show_route:
            for line in (*driver_lines(run), *(route_lines(run.chain) if run.chain is not None else ())):
                notes.print(line)
    return 0


async def _generate_many(args: argparse.Namespace, prompts: list[str]) -> int:
    """Print JSON lines, or the samples as plain text if there is one prompt and no --json."""
    console, failed = stdout_console(), False
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(open_client(args))
        options = sampling_of(args, client.generation_defaults)
        if args.n > 1 and not options["temperature"]:
            print("swarm: all samples will be the same text: add --temperature 0.8 for different ones", file=sys.stderr)
        answers = generate_concurrently(client, prompts, n=args.n, options=options)
        async for result in await stack.enter_async_context(contextlib.aclosing(answers)):
            if result.error is not None:
                failed = True
                prefix = f"prompt {result.index}: " if args.prompts_file else ""
                print(f"swarm: {prefix}{printable(str(result.error))}", file=sys.stderr)
            if args.json or args.prompts_file:
                common = {"draft": client.draft_choice.as_dict()} if args.json else {}
                console.file.writelines(json.dumps(sample | common) + "\n" for sample in result.as_dicts())
                console.file.flush()
            else:
                _print_samples(console, result)
    return 1 if failed else 0


def _print_samples(console: Console, answer: PromptResult) -> None:
    for sample, run in enumerate(answer.runs):
        console.print(f"--- sample {sample} of {len(answer.runs)}", style="dim")
        text = escape_controls(run.text) if console.is_terminal else run.text
        console.file.write(text + "\n")


async def _print_json(run: Run, client: SwarmClient) -> int:
    """Print the complete object even if the generation fails: then it has `error` and the text so far."""
    failure: SwarmError | None = None
    try:
        async for _ in run:
            pass
    except SwarmError as error:
        failure = error
        print(f"swarm: {printable(str(failure))}", file=sys.stderr)
    print(json.dumps(_as_dict(run, client, failure)))
    return 1 if failure else 0


def _as_dict(run: Run, client: SwarmClient, failure: SwarmError | None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "text": run.text,
        "token_ids": run.token_ids,
        "finish_reason": run.finish_reason,
        "prefix_tokens": run.prefix_tokens,
        "stats": run.stats.as_dict() if run.stats else None,
        "rounds": [report.as_dict() for report in run.recorder.reports],
        "numerics": asdict(client.target.numerics),
        "draft": client.draft_choice.as_dict(),
        "route": route_as_dict(run.chain) if run.chain else None,
        "drivers": drivers_as_dict(run),
    }
    if failure is not None:
        result["error"] = {"type": type(failure).__name__, "message": str(failure)}
    return result
