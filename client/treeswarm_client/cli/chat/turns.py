"""The turns of a chat: what is typed, asked, shown and kept."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from treeswarm.errors import BadRequest, SwarmError
from treeswarm_client.cli.chat.conversation import COMMANDS, Conversation, Entry, PartialEntry, unknown_command
from treeswarm_client.cli.chat.line_reader import LineReader
from treeswarm_client.cli.render.live import LiveText, summary_line
from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.run import Run
from treeswarm_client.loop_thread import LoopThread


@dataclass(frozen=True, eq=False)
class ChatOutput:
    """How a chat speaks."""

    out: Console
    """Answers, and nothing else."""
    notes: Console
    as_json: bool
    colours: bool

    def say(self, text: str, style: str = "dim") -> None:
        """A line beside the conversation."""
        self.notes.print(Text(text, style), soft_wrap=True)

    def tell(self, told: dict[str, Any]) -> None:
        """A line for machines."""
        self.out.file.write(json.dumps(told) + "\n")
        self.out.file.flush()


@dataclass(frozen=True)
class Attempt:
    """A message that was asked, and what had been said before it."""

    onto: Conversation
    question: str
    sample: int = 0
    """Another one at each try."""


@dataclass(frozen=True)
class ChatTotals:
    """What answers cost together.  Seconds."""

    answers: int = 0
    tokens: int = 0
    traversals: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    seconds: float = 0.0

    def plus(self, run: Run) -> "ChatTotals":
        """With one answer more."""
        return ChatTotals(
            self.answers + 1,
            self.tokens + len(run.token_ids),
            self.traversals + (run.stats.traversals if run.stats else 0),
            self.prompt_tokens + len(run.prompt_ids),
            self.prefix_tokens + run.prefix_tokens,
            self.seconds + (run.stats.seconds if run.stats else 0.0),
        )


@dataclass(eq=False)
class Chat:
    """One conversation, over a client that stays open."""

    client: SwarmClient
    background: LoopThread
    options: dict[str, Any]
    """As `SwarmClient.stream` takes them."""
    voice: ChatOutput
    typed: bool
    """By a person at a terminal, whose Ctrl-C stops the answer and not the chat."""
    conversation: Conversation = Conversation()
    failed: bool = False
    """At least one answer did."""
    _last: Run | None = None
    _attempt: Attempt | None = None
    _bill: ChatTotals = ChatTotals()
    _saved: set[Path] = field(default_factory=set)

    def talk(self, lines: LineReader) -> None:
        """Until the lines end, or /quit."""
        unfinished, on = PartialEntry(), True
        while on:
            try:
                heard = unfinished.add(lines.next(more=unfinished.begun))
                unfinished = heard if isinstance(heard, PartialEntry) else PartialEntry()
                on = isinstance(heard, PartialEntry) or self.do(heard)
            except EOFError:
                rest, on = unfinished.ended(), False
                if self.typed:
                    self.voice.say("")
                elif rest is not None:
                    self.do(rest)
            except KeyboardInterrupt:
                if not self.typed:
                    raise
                self.voice.say("" if unfinished.begun else "\nCtrl-D or /quit leaves")
                unfinished = PartialEntry()

    def do(self, entry: Entry) -> bool:
        """A command or a message; whether the chat goes on.  What goes wrong is told in a line."""
        try:
            if entry.command:
                return self._command(entry.command, entry.text)
            if entry.text.strip():
                self._ask(Attempt(self.conversation, entry.text))
        except SwarmError as error:
            self.failed = True
            self.voice.say(f"swarm: {error}", "red")
        return True

    def _ask(self, attempt: Attempt) -> None:
        """Its answer is kept as far as it comes; without any, the message is not kept either."""
        asked = self.client.encode_chat(attempt.onto.messages(attempt.question))
        room = self.client.target.max_positions - len(asked)
        if room < 1:
            raise BadRequest(
                f"the conversation has {len(asked)} tokens, the model's context {self.client.target.max_positions}: "
                "/undo takes the last turn back, /new begins again"
            )
        limit = min(self.options["max_new_tokens"], room)
        run = self.client.stream(asked, **self.options | {"max_new_tokens": limit, "sample": attempt.sample})
        self._last, self._attempt = run, attempt
        failure: SwarmError | None = None
        try:
            self.background.run(self._show(run))
        except SwarmError as error:
            failure = error
            raise
        except KeyboardInterrupt:
            if not self.typed:
                raise
        finally:
            if run.text or run.finish_reason is not None:
                self.conversation = attempt.onto.answered(attempt.question, run.text)
            self._bill = self._bill.plus(run)
            if self.voice.as_json:
                self.voice.tell(_as_dict(attempt, run, failure))
        self._remark(run, limit)

    async def _show(self, run: Run) -> None:
        live = LiveText(self.voice.out, colours=self.voice.colours)
        try:
            async for token in run:
                if not self.voice.as_json:
                    live.token(token)
        finally:
            if not self.voice.as_json and run.text and not run.text.endswith("\n"):
                live.end()
            await run.aclose()

    def _remark(self, run: Run, limit: int) -> None:
        if not self.typed:
            return
        if run.finish_reason == "length":
            self.voice.say(f"(ended at {limit} tokens: --max-new-tokens N sets how many)")
        elif run.finish_reason is None:
            kept = "it is kept as far as it came" if run.text else "nothing had come, nothing is kept"
            self.voice.say(f"(stopped: {kept}; /retry asks again)")

    def _command(self, command: str, rest: str) -> bool:
        """Whether the chat goes on.  Raises BadRequest."""
        if command == "/quit":
            return False
        if command not in COMMANDS:
            raise BadRequest(unknown_command(command))
        if rest and command not in ("/system", "/save"):
            raise BadRequest(f"{command} takes nothing behind it: {COMMANDS[command]}")
        if command == "/help":
            for name, what in COMMANDS.items():
                self.voice.say(f"{name:9} {what}", "")
            self.voice.say('a line that ends in \\ goes on in the next one; so does all between """ and """', "")
        elif command == "/new":
            self.conversation, self._attempt = Conversation(self.conversation.system), None
            self.voice.say("a new conversation")
        elif command == "/system":
            self.conversation = replace(self.conversation, system=rest)
            self.voice.say("the model is told so from now on" if rest else "there is no system text any more")
        elif command == "/undo":
            self._undo()
        elif command == "/retry":
            self._retry()
        elif command == "/save":
            self._save(rest)
        else:
            for line in self._stats():
                self.voice.say(line, "")
        return True

    def _undo(self) -> None:
        if not self.conversation.turns:
            raise BadRequest("there is nothing to take back")
        gone = self.conversation.turns[-1]
        self.conversation, self._attempt = self.conversation.undone(), None
        self.voice.say(f"taken back: {_beginning(gone.question)}")

    def _retry(self) -> None:
        attempt = self._attempt
        if attempt is None and self.conversation.turns:
            attempt = Attempt(self.conversation.undone(), self.conversation.turns[-1].question)
        if attempt is None:
            raise BadRequest("there is no message to ask again")
        if self.typed and self._last is not None and self._last.finish_reason and not self.options["temperature"]:
            self.voice.say("(without --temperature the answer is the same)")
        onto = replace(attempt.onto, system=self.conversation.system)
        self._ask(replace(attempt, onto=onto, sample=attempt.sample + 1))

    def _save(self, name: str) -> None:
        if not name:
            raise BadRequest("say where: /save FILE")
        path = Path(name).expanduser()
        if path.exists() and path.absolute() not in self._saved:
            raise BadRequest(f"{path} exists: give another name")
        messages = self.conversation.messages()
        as_json = json.dumps({"model": self.client.model, "messages": messages}, indent=2, ensure_ascii=False) + "\n"
        try:
            path.write_text(as_json if path.suffix == ".json" else self.conversation.as_text(), "utf-8")
        except OSError as error:
            raise BadRequest(f"{path} cannot be written: {error.strerror}") from None
        self._saved.add(path.absolute())
        self.voice.say(f"{len(messages)} messages are in {path}")

    def _stats(self) -> list[str]:
        run, bill = self._last, self._bill
        if run is None:
            return ["nothing has been asked yet"]
        first = "" if run.first_token_s is None else f", first token after {run.first_token_s:.2f} s"
        used = len(run.prompt_ids) + len(run.token_ids)
        return [
            summary_line(run.stats).plain if run.stats else "the last message never reached the nodes",
            f"prompt {len(run.prompt_ids)} tokens, prefix_tokens {run.prefix_tokens} (nodes had them already){first}",
            f"context {used} of {self.client.target.max_positions} tokens",
            f"all together: {bill.answers} answers, {bill.tokens} tokens in {bill.traversals} traversals and "
            f"{bill.seconds:.1f} s; prompts {bill.prompt_tokens} tokens, of which nodes had {bill.prefix_tokens}",
        ]


def _as_dict(attempt: Attempt, run: Run, failure: SwarmError | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "question": attempt.question,
        "text": run.text,
        "finish_reason": run.finish_reason,
        "prompt_tokens": len(run.prompt_ids),
        "prefix_tokens": run.prefix_tokens,
        "first_token_s": run.first_token_s,
        "stats": run.stats.as_dict() if run.stats else None,
    }
    if failure is not None:
        told["error"] = {"type": type(failure).__name__, "message": str(failure)}
    return told


def _beginning(text: str) -> str:
    line = text.strip().partition("\n")[0]
    return line if len(line) <= 60 else line[:60] + "…"
