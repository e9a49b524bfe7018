"""`swarm chat`: a conversation with the model, at a terminal or through a pipe."""

import argparse
import sys

from rich.console import Console

from treeswarm_client.cli.chat.conversation import COMMANDS, Conversation
from treeswarm_client.cli.chat.line_reader import PipeReader, TerminalReader, history_path, line_editing
from treeswarm_client.cli.chat.turns import Chat, ChatOutput
from treeswarm_client.cli.flags import add_client_flags, add_sampling_flags, open_client, sampling_of
from treeswarm_client.cli.render.live import stdout_console
from treeswarm_client.client import SwarmClient
from treeswarm_client.loop_thread import LoopThread

# Enough for an answer; a model ends by itself.
MAX_NEW_TOKENS = 512
EXAMPLES = """examples:
  swarm chat --model Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B --registry 203.0.113.7:4001
  swarm chat --model Qwen/Qwen3-8B --registry 203.0.113.7:4001 --system "Answer in one sentence." --temperature 0.7
  swarm chat --model demo --registry 203.0.113.7:4001 --colours     each round trip in a colour of its own
  swarm chat --model Qwen/Qwen3-8B --registry 203.0.113.7:4001 < questions.txt
  swarm chat --model Qwen/Qwen3-8B --registry 203.0.113.7:4001 --json < questions.txt | jq -r .text

A line that ends in a backslash goes on in the next one; so does all between triple quotes (\"\"\").  Ctrl-C stops an
answer, which stays as far as it came; Ctrl-D leaves.  Piped in, every line is a message; answers are printed, and the
exit status is 1 if any failed.  Commands:
""" + "\n".join(f"  {name:9} {what}" for name, what in COMMANDS.items())


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    made = commands.add_parser(
        "chat",
        help="talk with the model",
        description="Talk with the model, in its own chat template; what was said before costs little: nodes keep it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_client_flags(made)
    add_sampling_flags(made, max_new_tokens=MAX_NEW_TOKENS)
    made.add_argument("--system", default="", metavar="TEXT", help="what the model is told before all")
    made.add_argument("--colours", action="store_true", help="each round trip's tokens in a colour of their own")
    made.add_argument("--no-history", action="store_true", help=f"do not keep what is typed in {history_path()}")
    made.add_argument("--json", action="store_true", help="one JSON object an answer instead of live text")
    made.set_defaults(run=_command)


def _command(args: argparse.Namespace) -> int:
    typed = sys.stdin.isatty()
    out, notes = stdout_console(), Console(highlight=False, stderr=True)
    prompted = typed and out.is_terminal
    with LoopThread("swarm") as background:
        opened = open_client(args)
        client = background.run(opened.__aenter__())
        try:
            voice = ChatOutput(out, notes, as_json=args.json, colours=args.colours)
            chat = Chat(client, background, sampling_of(args), voice, typed, Conversation(args.system))
            client.encode_chat(chat.conversation.messages("?"))  # a model that cannot chat says so at once
            if not typed:
                chat.talk(PipeReader())
                return 1 if chat.failed else 0
            if prompted:
                _greet(notes, client)
            with line_editing(COMMANDS, history=None if args.no_history else history_path()):
                chat.talk(TerminalReader(prompted=prompted))
            return 0
        finally:
            background.run(opened.__aexit__(None, None, None))


def _greet(notes: Console, client: SwarmClient) -> None:
    target = client.target
    plain = "" if target.numerics.plain else ", not the text of the weights as published"
    notes.print(
        f"{client.model}, {target.blocks} blocks in {target.numerics}{plain}, context {target.max_positions} tokens",
        style="dim",
        markup=False,
    )
    notes.print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves", style="dim")
