"""The turns of a chat: reads messages and commands, streams answers, and keeps the conversation."""

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
from treeswarm_client.generation.route_dict import drivers_as_dict
from treeswarm_client.generation.run import Run
from treeswarm_client.loop_thread import LoopThread


@dataclass(frozen=True, eq=False)
class ChatOutput:
    """Where a chat writes, and in which form."""

    answers: Console
    """Console for the answers, and for nothing else."""
    notes: Console
    """Console for everything beside the answers."""
    interactive: bool
    """Whether a person types at a terminal.  Then Ctrl-C stops the answer and not the chat."""
    as_json: bool = False
    colours: bool = False
    """Whether each traversal's tokens get a colour of their own."""

    def note(self, text: str, style: str = "dim") -> None:
        """Write a line beside the conversation."""
        self.notes.print(Text(text, style), soft_wrap=True)

    def write_json(self, value: dict[str, Any]) -> None:
        """Write an object as one line among the answers."""
        self.answers.file.write(json.dumps(value) + "\n")
        self.answers.file.flush()


@dataclass(frozen=True)
class Attempt:
    """A message that was sent, and the conversation before it."""

    before: Conversation
    question: str
    sample: int = 0
    """Number of the sample, counted up by each /retry."""


@dataclass(frozen=True)
class ChatTotals:
    """What all answers of a chat cost together."""

    answers: int = 0
    tokens: int = 0
    traversals: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    """Number of prompt tokens that nodes had in their caches."""
    seconds: float = 0.0

    def add(self, run: Run) -> "ChatTotals":
        """Return the totals with one more answer."""
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
    """One chat over a client that stays open."""

    client: SwarmClient
    background: LoopThread
    """Thread in which the client runs."""
    options: dict[str, Any]
    """Options of `SwarmClient.stream`."""
    output: ChatOutput
    conversation: Conversation = Conversation()
    failed: bool = False
    """Whether an answer or a command has failed."""
    _last_run: Run | None = None
    _last_attempt: Attempt | None = None
    _totals: ChatTotals = ChatTotals()
    _saved: set[Path] = field(default_factory=set)
    """Files that this chat has written, and may write again."""

    def run(self, reader: LineReader) -> None:
        """Handle lines until they end, or until /quit."""
        partial, go_on = PartialEntry(), True
        while go_on:
            try:
                entry = partial.add(reader.read_line(continued=partial.begun))
                partial = entry if isinstance(entry, PartialEntry) else PartialEntry()
                go_on = isinstance(entry, PartialEntry) or self.handle(entry)
            except EOFError:
                rest, go_on = partial.finish(), False
                if self.output.interactive:
                    self.output.note("")
                elif rest is not None:
                    self.handle(rest)
            except KeyboardInterrupt:
                if not self.output.interactive:
                    raise
                self.output.note("" if partial.begun else "\nCtrl-D or /quit leaves")
                partial = PartialEntry()

    def handle(self, entry: Entry) -> bool:
        """Handle a command or a message, and return whether the chat goes on.  An error is written as one line."""
        try:
            if entry.command:
                return self._run_command(entry.command, entry.text)
            if entry.text.strip():
                self._send(Attempt(self.conversation, entry.text))
        except SwarmError as error:
            self.failed = True
            self.output.note(f"swarm: {error}", "red")
        return True

    def _send(self, attempt: Attempt) -> None:
        """Send a message.  A partial answer is kept with the message; without any answer, neither is kept."""
        prompt = self.client.encode_chat(attempt.before.messages(attempt.question))
        context = self.client.target.max_positions
        room = context - len(prompt)
        if room < 1:
            raise BadRequest(
                f"the conversation has {len(prompt)} tokens, and the model's context is {context}: /undo takes back "
                "the last turn, /new begins again"
            )
        limit = min(self.options["max_new_tokens"], room)
        run = self.client.stream(prompt, **self.options | {"max_new_tokens": limit, "sample": attempt.sample})
        self._last_run, self._last_attempt = run, attempt
        failure: SwarmError | None = None
        try:
            self.background.run(self._stream(run))
        except SwarmError as error:
            failure = error
            raise
        except KeyboardInterrupt:
            if not self.output.interactive:
                raise
        finally:
            if run.text or run.finish_reason is not None:
                self.conversation = attempt.before.with_turn(attempt.question, run.text)
            self._totals = self._totals.add(run)
            if self.output.as_json:
                self.output.write_json(_as_dict(attempt, run, failure) | {"draft": self.client.draft_choice.as_dict()})
        if self.output.interactive:
            self._note_early_end(run, limit)

    async def _stream(self, run: Run) -> None:
        live = LiveText(self.output.answers, colours=self.output.colours)
        try:
            async for token in run:
                if not self.output.as_json:
                    live.token(token)
        finally:
            if not self.output.as_json and run.text and not run.text.endswith("\n"):
                live.end()
            await run.aclose()

    def _note_early_end(self, run: Run, limit: int) -> None:
        if run.finish_reason == "length":
            self.output.note(f"(ended at {limit} tokens: --max-new-tokens N sets this limit)")
        elif run.finish_reason is None:
            kept = "the partial answer is kept" if run.text else "there was no answer yet, and nothing is kept"
            self.output.note(f"(stopped: {kept}; /retry asks again)")

    def _run_command(self, command: str, rest: str) -> bool:
        """Run a command and return whether the chat goes on.  Raises BadRequest."""
        if command == "/quit":
            return False
        if command not in COMMANDS:
            raise BadRequest(unknown_command(command))
        if rest and command not in ("/system", "/save"):
            raise BadRequest(f"{command} takes no argument, and '{_shorten(rest)}' was given: {COMMANDS[command]}")
        if command == "/help":
            for name, description in COMMANDS.items():
                self.output.note(f"{name:9} {description}", "")
            self.output.note('a message continues on the next line after a final \\, and between """ and """', "")
        elif command == "/new":
            self.conversation, self._last_attempt = Conversation(self.conversation.system), None
            self.output.note("a new conversation begins")
        elif command == "/system":
            self.conversation = replace(self.conversation, system=rest)
            self.output.note("the system text is set" if rest else "the system text is removed")
        elif command == "/undo":
            self._undo()
        elif command == "/retry":
            self._retry()
        elif command == "/save":
            self._save(rest)
        else:
            for line in self._stats():
                self.output.note(line, "")
        return True

    def _undo(self) -> None:
        if not self.conversation.turns:
            raise BadRequest("there is no message to take back")
        removed = self.conversation.turns[-1]
        self.conversation, self._last_attempt = self.conversation.without_last_turn(), None
        self.output.note(f"taken back: {_shorten(removed.question)}")

    def _retry(self) -> None:
        attempt = self._last_attempt
        if attempt is None and self.conversation.turns:
            attempt = Attempt(self.conversation.without_last_turn(), self.conversation.turns[-1].question)
        if attempt is None:
            raise BadRequest("there is no message to ask again")
        finished = self._last_run is not None and self._last_run.finish_reason is not None
        if self.output.interactive and finished and not self.options["temperature"]:
            self.output.note("(the answer will be the same: start with --temperature above 0 for others)")
        before = replace(attempt.before, system=self.conversation.system)
        self._send(replace(attempt, before=before, sample=attempt.sample + 1))

    def _save(self, name: str) -> None:
        if not name:
            raise BadRequest("no file is given: /save FILE")
        path = Path(name).expanduser()
        if path.exists() and path.absolute() not in self._saved:
            raise BadRequest(f"{path} exists: give another name")
        messages = self.conversation.messages()
        as_json = json.dumps({"model": self.client.model, "messages": messages}, indent=2, ensure_ascii=False) + "\n"
        try:
            path.write_text(as_json if path.suffix == ".json" else self.conversation.as_text(), "utf-8")
        except OSError as error:
            raise BadRequest(f"{path} cannot be written ({error.strerror}): give another name") from None
        self._saved.add(path.absolute())
        self.output.note(f"{len(messages)} messages are in {path}")

    def _stats(self) -> list[str]:
        run, totals = self._last_run, self._totals
        if run is None:
            return ["no message has been sent yet"]
        first = "" if run.first_token_s is None else f", first token after {run.first_token_s:.2f} s"
        used = len(run.prompt_ids) + len(run.token_ids)
        return [
            summary_line(run.stats).plain if run.stats else "the last message did not reach the nodes",
            f"prompt: {len(run.prompt_ids)} tokens, {run.prefix_tokens} of them cached on the nodes{first}",
            f"context: {used} of {self.client.target.max_positions} tokens",
            f"all together: {totals.answers} answers, {totals.tokens} tokens in {totals.traversals} traversals and "
            f"{totals.seconds:.1f} s; {totals.prompt_tokens} prompt tokens, of which nodes had {totals.prefix_tokens}",
        ]


def _as_dict(attempt: Attempt, run: Run, failure: SwarmError | None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "question": attempt.question,
        "text": run.text,
        "finish_reason": run.finish_reason,
        "prompt_tokens": len(run.prompt_ids),
        "prefix_tokens": run.prefix_tokens,
        "first_token_s": run.first_token_s,
        "stats": run.stats.as_dict() if run.stats else None,
        "drivers": drivers_as_dict(run),
    }
    if failure is not None:
        result["error"] = {"type": type(failure).__name__, "message": str(failure)}
    return result


def _shorten(text: str) -> str:
    """Return the first line of a text, at most 60 characters of it."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= 60 else line[:60] + "…"
