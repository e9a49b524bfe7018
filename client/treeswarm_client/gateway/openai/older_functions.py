"""OpenAI's older form of tools: `functions` and `function_call`, translated into tools and back.  Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treeswarm_client.gateway.answers.pieces import ChoiceAnswer, Piece
from treeswarm_client.gateway.answers.writer import AnswerWriter
from treeswarm_client.gateway.errors import Failure
from treeswarm_client.gateway.events import Usage
from treeswarm_client.gateway.generation_request import InvalidParameter
from treeswarm_client.generation.run import Token

# Id of a call in the older form, which has none.
CALL_ID = "call_older1"


def has_older_functions(body: Mapping[str, Any]) -> bool:
    """Return whether a request's body offers functions in the older form, or asks for a call of one."""
    return bool(body.get("functions")) or body.get("function_call") not in (None, "auto", "none")


def with_tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a body whose functions and calls are tools and their calls.  Raises InvalidParameter."""
    functions, choice = body.get("functions") or [], body.get("function_call")
    if body.get("tools"):
        raise InvalidParameter("functions", "functions is the older form of tools: give one of the two")
    if not isinstance(functions, list):
        raise InvalidParameter("functions", "functions is no list: give tools in its place")
    rest = {name: value for name, value in body.items() if name not in ("functions", "function_call")}
    if choice is not None:
        rest["tool_choice"] = choice if isinstance(choice, str) else {"type": "function", "function": choice}
    messages = body.get("messages")
    if isinstance(messages, list):
        rest["messages"] = [_with_calls(one) if isinstance(one, dict) else one for one in messages]
    tools = [{"type": "function", "function": function} for function in functions]
    return {**rest, "tools": tools, "parallel_tool_calls": False}


def _with_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    if message.get("role") == "function":
        return {**message, "role": "tool", "tool_call_id": CALL_ID}
    called = message.get("function_call")
    rest = {name: value for name, value in message.items() if name != "function_call"}
    if called is not None:
        rest["tool_calls"] = [{"id": CALL_ID, "type": "function", "function": called}]
    return rest


@dataclass(eq=False)
class OlderCallsWriter:
    """Writes the one call of an answer in the older form."""

    writer: AnswerWriter
    last_frame: str = field(init=False)

    def __post_init__(self) -> None:
        self.last_frame = self.writer.last_frame

    def whole(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> dict[str, Any]:
        return _in_older_form(self.writer.whole(answers, usage))

    def begin(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Iterator[dict[str, Any]]:
        return map(_in_older_form, self.writer.begin(answers, usage))

    def token(self, choice: int, token: Token, pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
        return map(_in_older_form, self.writer.token(choice, token, pieces))

    def end_choice(self, choice: int, answer: ChoiceAnswer, pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
        return map(_in_older_form, self.writer.end_choice(choice, answer, pieces))

    def end(self, answers: Sequence[ChoiceAnswer], usage: Usage) -> Iterator[dict[str, Any]]:
        return map(_in_older_form, self.writer.end(answers, usage))

    def fail(self, failure: Failure) -> Iterator[dict[str, Any]]:
        return self.writer.fail(failure)

    def frame(self, event: dict[str, Any]) -> str:
        return self.writer.frame(event)


def _in_older_form(event: dict[str, Any]) -> dict[str, Any]:
    return {**event, "choices": [_older_choice(choice) for choice in event["choices"]]}


def _older_choice(choice: dict[str, Any]) -> dict[str, Any]:
    part = "message" if "message" in choice else "delta"
    said = dict(choice[part])
    if calls := said.pop("tool_calls", None):
        said["function_call"] = calls[0]["function"]
    finish = "function_call" if choice["finish_reason"] == "tool_calls" else choice["finish_reason"]
    return {**choice, part: said, "finish_reason": finish}
