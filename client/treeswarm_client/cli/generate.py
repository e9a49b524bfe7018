"""`swarm generate`: continue a prompt, or many."""

import argparse
import asyncio
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from treeswarm.errors import BadRequest, SwarmError
from treeswarm.protocol.messages import NumericsClass
from treeswarm_client.cli.concurrent import PromptResult, generate_concurrently
from treeswarm_client.cli.flags import add_client_flags, add_sampling_flags, open_client, sampling_of
from treeswarm_client.cli.prompts import read_prompt, read_prompts
from treeswarm_client.cli.render.live import LiveText, escape_controls, stdout_console, summary_line
from treeswarm_client.cli.render.route_lines import route_as_dict, route_lines
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

The prompt is PROMPT, a file, or standard input (`-`, or no PROMPT at all); of the last two, one line end at their end
is left out.  On a terminal the prompt is shown before its text; elsewhere standard output has the new text alone."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    made = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt with the target model's own text, token for token.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text to continue; `-`: from standard input")
    made.add_argument("--prompt-file", type=Path, metavar="FILE", help="the prompt is what this file says")
    made.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help='a prompt a line, side by side; a .jsonl file has a JSON string or {"prompt": …} a line; answers are '
        "JSON lines in the same order",
    )
    add_client_flags(made)
    add_sampling_flags(made, max_new_tokens=128)
    made.add_argument("--n", type=int, default=1, metavar="N", help="samples of each prompt, side by side (default 1)")
    made.add_argument("--show-route", action="store_true", help="which nodes computed what, and what happened to them")
    made.add_argument("--explain", action="store_true", help="on stderr: each traversal's tree, why, where time went")
    made.add_argument("--json", action="store_true", help="one JSON object a text instead of live text")
    made.set_defaults(run=_command)


def _command(args: argparse.Namespace) -> int:
    if args.n < 1:
        raise BadRequest(f"--n {args.n} asks for no text: give at least 1")
    if args.prompts_file is None:
        prompts = [read_prompt(args.prompt, args.prompt_file, sys.stdin)]
        if args.n == 1:
            return asyncio.run(_one(args, prompts[0]))
    elif args.prompt is not None or args.prompt_file is not None:
        raise BadRequest("--prompts-file has all prompts: leave PROMPT and --prompt-file out")
    else:
        prompts = read_prompts(args.prompts_file, sys.stdin)
    if args.show_route or args.explain:
        raise BadRequest("--show-route and --explain tell of one text: leave --n and --prompts-file out")
    return asyncio.run(_many(args, prompts))


async def _one(args: argparse.Namespace, prompt: str) -> int:
    async with open_client(args) as client:
        run = client.stream(prompt, **sampling_of(args))
        try:
            if args.json:
                return await _as_json(run, client.target.numerics)
            return await _live(prompt, run, client.target.numerics, show_route=args.show_route)
        finally:
            if args.explain:
                print(*explain_lines(run.recorder.reports), sep="\n", file=sys.stderr)


async def _live(prompt: str, run: Run, numerics: NumericsClass, *, show_route: bool) -> int:
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
                notes.print(f"computed in {numerics}: not the text of the weights as published", style="dim")
        if show_route and run.chain is not None:
            for line in route_lines(run.chain):
                notes.print(line)
    return 0


async def _many(args: argparse.Namespace, prompts: list[str]) -> int:
    """JSON lines; the samples of the one prompt of a command line may also be read as they are."""
    console, failed = stdout_console(), False
    if args.n > 1 and not args.temperature:
        print("swarm: all samples will be the same text: give --temperature 0.8 for others", file=sys.stderr)
    async with (
        open_client(args) as client,
        contextlib.aclosing(generate_concurrently(client, prompts, n=args.n, options=sampling_of(args))) as answers,
    ):
        async for answer in answers:
            if answer.error is not None:
                failed = True
                which = f"prompt {answer.index}: " if args.prompts_file else ""
                print(f"swarm: {which}{answer.error}", file=sys.stderr)
            if args.json or args.prompts_file:
                console.file.writelines(json.dumps(one) + "\n" for one in answer.as_dicts())
                console.file.flush()
            else:
                _show_samples(console, answer)
    return 1 if failed else 0


def _show_samples(console: Console, answer: PromptResult) -> None:
    for sample, run in enumerate(answer.runs):
        console.print(f"--- sample {sample} of {len(answer.runs)}", style="dim")
        text = escape_controls(run.text) if console.is_terminal else run.text
        console.file.write(text + "\n")


async def _as_json(run: Run, numerics: NumericsClass) -> int:
    """The object comes out whole even when the generation broke: with `error` and the text so far."""
    failure: SwarmError | None = None
    try:
        async for _ in run:
            pass
    except SwarmError as error:
        failure = error
        print(f"swarm: {failure}", file=sys.stderr)
    print(json.dumps(_whole(run, numerics, failure)))
    return 1 if failure else 0


def _whole(run: Run, numerics: NumericsClass, failure: SwarmError | None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "text": run.text,
        "token_ids": run.token_ids,
        "finish_reason": run.finish_reason,
        "prefix_tokens": run.prefix_tokens,
        "stats": run.stats.as_dict() if run.stats else None,
        "rounds": [report.as_dict() for report in run.recorder.reports],
        "numerics": asdict(numerics),
        "route": route_as_dict(run.chain) if run.chain else None,
    }
    if failure is not None:
        result["error"] = {"type": type(failure).__name__, "message": str(failure)}
    return result
