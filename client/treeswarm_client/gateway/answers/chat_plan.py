"""What a request for a chat means for this model: what its template gets, and how its answer is read.  Pure."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treeswarm.protocol.text_rules import Grammar
from treeswarm_client.chat_template import ChatTemplate, MessageDict
from treeswarm_client.chat_template.messages import check_messages
from treeswarm_client.gateway.answers.pieces import AnswerSplitter, CallPiece, Piece, TextPiece, ThoughtPiece
from treeswarm_client.gateway.generation_request import ChatPrompt, Unsupported
from treeswarm_client.tool_calls.described import describe_tools
from treeswarm_client.tool_calls.events import (
    AnswerEvent,
    ArgumentsText,
    CallBegun,
    CallEnded,
    ContentText,
    ReasoningText,
)
from treeswarm_client.tool_calls.formats import DESCRIBED, AnswerFormat
from treeswarm_client.tool_calls.offered import OfferedTools
from treeswarm_client.tool_calls.parser import AnswerParser
from treeswarm_client.tool_calls.required import required_grammar

# Variables of templates by which a caller says how much a model thinks.
EFFORT, ENABLED = "reasoning_effort", "enable_thinking"
NO_EFFORT = "none"
ID_BYTES = 12


@dataclass(frozen=True)
class ChatPlan:
    """A conversation as the model's template gets it, and how the answer is read."""

    messages: Sequence[MessageDict]
    tools: Sequence[Mapping[str, Any]] | None
    """Tools that the template writes, or None."""
    variables: Mapping[str, Any]
    """Variables of the template."""
    form: AnswerFormat
    offered: OfferedTools | None
    """Tools that the model may call, or None if calls are text."""
    one_call: bool
    """Whether only the first call of an answer counts."""
    continued: str | None = None
    """Text of the message that the answer goes on with, or None if it is a new message."""
    required: OfferedTools | None = None
    """Tools of which the answer must call one, or None if it need not."""

    @property
    def shown_special(self) -> tuple[str, ...]:
        """Texts whose special tokens must stay in the answer's text, because they tell its parts."""
        calls = self.form.calls if self.offered is not None or self.form.is_harmony else None
        return AnswerFormat(calls, self.form.reasoning).marks

    def splitter(self, prompt_end: str) -> AnswerSplitter:
        """Return what reads one answer to the prompt that ends so."""
        parser = AnswerParser(self.form, self.offered, is_thinking=self._begins_thinking(prompt_end))
        makes_id = self.form.calls.makes_id if self.form.calls is not None else str
        return CallSplitter(parser, makes_id, self.one_call)

    def grammar(self, prompt_end: str, special: Mapping[str, int]) -> Grammar | None:
        """Return the grammar of an answer that must call a tool, or None if it need not.  Raises BadRequest.

        `special` are the tokenizer's special tokens with their ids.
        """
        if self.required is None:
            return None
        is_thinking = self._begins_thinking(prompt_end)
        return required_grammar(self.form, self.required, special, several=not self.one_call, is_thinking=is_thinking)

    def _begins_thinking(self, prompt_end: str) -> bool:
        """Return whether the answer begins within thinking."""
        thinking = self.form.reasoning
        if thinking is None:
            return False
        return thinking.ends(prompt_end) if self.continued is None else thinking.is_open_in(self.continued)


def plan_chat(chat: ChatPrompt, template: ChatTemplate | None, form: AnswerFormat) -> ChatPlan:
    """Return what a chat means for a model with this template and format.

    Raises Unsupported if it asks for what the model does not have.
    """
    continued = str(chat.messages[-1].get("content") or "") if chat.continues else None
    source = template.source if template is not None else ""
    variables = {**_effort_variables(chat.reasoning_effort, source), **chat.template_kwargs}
    if not chat.tools or chat.tool_choice == "none":
        return ChatPlan(chat.messages, None, variables, form, None, one_call=False, continued=continued)
    if form.calls is None:
        raise Unsupported(
            "tools",
            "calls are not read here, because the model's chat template writes tools in a format that is not known, or "
            "the gateway was started with --tool-parser none: name the format in --tool-parser, or take another model",
        )
    messages: Sequence[MessageDict] = chat.messages
    tools: Sequence[Mapping[str, Any]] | None = chat.tools
    if template is not None and not template.writes_tools:
        if form.calls.name != DESCRIBED:
            raise Unsupported(
                "tools",
                "this model's chat template leaves tools out: take another model, or start the gateway with "
                f"--tool-parser {DESCRIBED}, which describes them in the system message",
            )
        check_messages(chat.messages)
        messages, tools = describe_tools(chat.messages, chat.tools), None
    return ChatPlan(
        messages,
        tools,
        variables,
        form,
        OfferedTools.of(chat.tools),
        one_call=not chat.parallel_tool_calls or chat.required_tool is not None,
        continued=continued,
        required=_required(chat),
    )


def _required(chat: ChatPrompt) -> OfferedTools | None:
    if chat.tool_choice != "required":
        return None
    chosen = [tool for tool in chat.tools if chat.required_tool in (None, tool["function"]["name"])]
    return OfferedTools.of(chosen)


def _effort_variables(effort: str | None, source: str) -> dict[str, Any]:
    """Return the variables with which a template gets OpenAI's `reasoning_effort`.  Raises Unsupported."""
    if effort is None:
        return {}
    if EFFORT in source:
        return {EFFORT: effort}
    if ENABLED in source:
        return {ENABLED: effort != NO_EFFORT}
    if effort == NO_EFFORT and "</think>" not in source:
        return {}
    raise Unsupported(EFFORT, f"reasoning_effort is {effort}, but this model has no such setting: leave it out")


@dataclass(eq=False)
class CallSplitter:
    """Divides an answer into text, thoughts and calls, which it gives ids."""

    parser: AnswerParser
    makes_id: Callable[[str], str]
    one_call: bool
    _calls: list[CallPiece] = field(default_factory=list)
    """The first pieces of all calls so far."""
    _is_done: bool = False
    """Whether the only call that counts is complete."""

    def add(self, text: str) -> list[Piece]:
        return self._pieces(self.parser.feed(text)) if text else []

    def end(self) -> list[Piece]:
        return self._pieces(self.parser.finish())

    def _pieces(self, events: Sequence[AnswerEvent]) -> list[Piece]:
        return [piece for event in events if not self._is_done for piece in self._of(event)]

    def _of(self, event: AnswerEvent) -> list[Piece]:
        match event:
            case ContentText(text):
                return [TextPiece(text)]
            case ReasoningText(text):
                return [ThoughtPiece(text)]
            case CallBegun(index, name, id):
                call_id = id or self.makes_id(secrets.token_hex(ID_BYTES))
                self._calls.append(CallPiece(index, call_id, name, "", begins=True))
                return [self._calls[-1]]
            case ArgumentsText(index, text):
                call = self._calls[index]
                return [CallPiece(index, call.call_id, call.name, text, begins=False)]
            case CallEnded():
                self._is_done = self.one_call
                return []
