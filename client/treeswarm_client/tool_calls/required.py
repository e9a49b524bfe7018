"""The grammar of an answer that must call a tool.  Pure."""

from collections.abc import Mapping

from treeswarm.errors import BadRequest
from treeswarm.protocol.text_rules import Grammar
from treeswarm_client.tool_calls.formats import AnswerFormat, CallFormat
from treeswarm_client.tool_calls.lark import LarkWriter
from treeswarm_client.tool_calls.offered import OfferedTools

# Line breaks that models write between thinking and calls.
BREAKS = r"/\n{0,2}/"


def required_grammar(
    form: AnswerFormat, tools: OfferedTools, special: Mapping[str, int], *, several: bool, is_thinking: bool
) -> Grammar:
    """Return the grammar of an answer that calls one of the tools, or `several` calls if the format has them.

    Thinking may come before, and must end if the prompt began it (`is_thinking`).  `special` are the tokenizer's
    special tokens with their ids.  Raises BadRequest if the grammar is too large.
    """
    if form.calls is None:
        raise BadRequest("the model has no format of tool calls that is known here")
    lark = LarkWriter({token: id for token, id in special.items() if any(token in mark for mark in form.marks)})
    calls = _harmony(lark, tools) if form.is_harmony else _calls(lark, form.calls, tools, several=several)
    return Grammar("lark", lark.grammar(f"{_thinking(lark, form, is_thinking)} {calls}"))


def _calls(lark: LarkWriter, kind: CallFormat, tools: OfferedTools, *, several: bool) -> str:
    bodies = kind.leading.items() if kind.leading else kind.openers.items()
    opener, body = next(iter(bodies))
    begins = "" if kind.leading else lark.text(opener)
    block = f"{begins} {body.grammar(lark, tools, several=several)}"
    repeats = several and not body.holds_several and not kind.leading
    blocks = lark.repeated(lark.rule(block), '"\\n"?', several=repeats)
    return f"{lark.text(kind.around[0])} {blocks} {lark.text(kind.around[1])}"


def _thinking(lark: LarkWriter, form: AnswerFormat, is_open: bool) -> str:
    if form.reasoning is None:
        return ""
    thought = f"{lark.up_to(form.reasoning.closer)} {BREAKS}"
    return thought if is_open else f"({lark.text(form.reasoning.opener)} {thought})?"


def _harmony(lark: LarkWriter, tools: OfferedTools) -> str:
    thoughts = (
        f"{lark.text('<|channel|>analysis<|message|>')} {lark.up_to('<|end|>')} {lark.text('<|start|>assistant')}"
    )
    calls = []
    for name, schema in tools.schemas.items():
        header = lark.text(f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>")
        calls.append(f"{header} {lark.arguments(schema)}")
    return f"({thoughts})? {lark.either(calls)}"
