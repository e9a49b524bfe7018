"""`swarm chat`: a conversation with the model, at a terminal or through a pipe."""

import argparse
import contextlib
import sys

from rich.console import Console

from treeswarm.programs.interrupts import interrupt_ends_process
from treeswarm_client.cli.chat.conversation import COMMANDS, Conversation
from treeswarm_client.cli.chat.line_reader import PipeReader, TerminalReader, history_path, line_editing
from treeswarm_client.cli.chat.turns import Chat, ChatOutput
from treeswarm_client.cli.checks import check_chat, check_client_flags, check_sampling_flags
from treeswarm_client.cli.flags import (
    add_client_flags,
    add_sampling_flags,
    open_client,
    report_served_models,
    sampling_of,
)
from treeswarm_client.cli.render.draft_offer import offer_draft
from treeswarm_client.cli.render.live import stdout_console
from treeswarm_client.client import SwarmClient
from treeswarm_client.loop_thread import LoopThread

# Number of tokens that is enough for most answers; a model ends an answer by itself.
MAX_NEW_TOKENS = 512
EXAMPLES = """examples:
  swarm chat --model Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B --registry 203.0.113.7:4001
  swarm chat --model Qwen/Qwen3-8B --registry 203.0.113.7:4001 --system "Answer in one sentence." --temperature 0.7
  swarm chat --model demo --registry 203.0.113.7:4001 --colours     each traversal in a colour of its own
  swarm chat --model Qwen/Qwen3-8B --registry 203.0.113.7:4001 < questions.txt
  swarm chat --model Qwen/Qwen3-8B --registry 203.0.113.7:4001 --json < questions.txt | jq -r .text

A message continues on the next line after a final backslash, and between triple quotes (\"\"\").  Ctrl-C stops an
answer and keeps what has come; Ctrl-D leaves.  From a pipe, every line is a message; answers are printed, and the exit
status is 1 if any failed.  Commands:
""" + "\n".join(f"  {name:9} {description}" for name, description in COMMANDS.items())


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `swarm chat` to the command line."""
    parser = commands.add_parser(
        "chat",
        help="chat with the model",
        description="Chat with the model in its own chat template.  Earlier turns cost little: nodes cache them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_client_flags(parser)
    add_sampling_flags(parser, max_new_tokens=MAX_NEW_TOKENS)
    parser.add_argument("--system", default="", metavar="TEXT", help="system text that precedes the conversation")
    parser.add_argument("--colours", action="store_true", help="show each traversal's tokens in a colour of their own")
    parser.add_argument(
        "--no-history", action="store_true", help=f"do not keep the history of typed lines in {history_path()}"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per answer instead of live text")
    parser.set_defaults(run=_command)


def _command(args: argparse.Namespace) -> int:
    interactive = sys.stdin.isatty()
    out, notes = stdout_console(), Console(highlight=False, stderr=True)
    prompted = interactive and out.is_terminal
    with interrupt_ends_process():
        _check(args)
    background = LoopThread("swarm")
    background.start()
    opened = open_client(args)
    # If this fails or is interrupted, the program ends without the thread, which may be loading a draft model.
    client = background.run(opened.__aenter__())
    with contextlib.closing(background):
        try:
            output = ChatOutput(out, notes, interactive, as_json=args.json, colours=args.colours)
            options = sampling_of(args, client.generation_defaults)
            chat = Chat(client, background, options, output, Conversation(args.system))
            if not interactive:
                chat.run(PipeReader())
                return 1 if chat.failed else 0
            if prompted:
                _greet(notes, client)
            with line_editing(COMMANDS, history=None if args.no_history else history_path()):
                chat.run(TerminalReader(prompted=prompted))
            return 0
        finally:
            background.run(opened.__aexit__(None, None, None))


def _check(args: argparse.Namespace) -> None:
    """Find mistakes, and models that cannot chat, before anything is loaded or connected."""
    check_client_flags(args)
    check_sampling_flags(args)
    with report_served_models(args):
        check_chat(args, Conversation(args.system).messages("?"))
        offer_draft(args)


def _greet(notes: Console, client: SwarmClient) -> None:
    target = client.target
    note = "" if target.numerics.plain else " (the published weights may give another text)"
    notes.print(
        f"{client.model}: {target.blocks} blocks, {target.numerics}{note}, context {target.max_positions} tokens",
        style="dim",
        markup=False,
    )
    notes.print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves", style="dim")
