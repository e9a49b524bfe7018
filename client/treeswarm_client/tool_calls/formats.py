"""The formats in which families of models write calls and thinking, and how a chat template tells its own.

One line per format: a new family needs one here only if it writes calls in a way of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from treeswarm.errors import BadRequest
from treeswarm_client.tool_calls.bodies.call_reader import CallBody
from treeswarm_client.tool_calls.bodies.gemma_calls import GemmaCall
from treeswarm_client.tool_calls.bodies.json_calls import LIST, JsonCalls
from treeswarm_client.tool_calls.bodies.named_calls import DeepSeekCall, KimiCall, MistralCalls
from treeswarm_client.tool_calls.bodies.python_calls import PARAMETERS, PythonCalls, PythonTag
from treeswarm_client.tool_calls.bodies.tagged_calls import TaggedCalls
from treeswarm_client.tool_calls.harmony import MARKS as HARMONY_MARKS
from treeswarm_client.tool_calls.reasoning import ReasoningFormat

Kind = TypeVar("Kind")
AUTO, NONE = "auto", "none"
HARMONY = "harmony"
DESCRIBED = "hermes"
"""Name of the format in which calls of described tools are written; see `described`."""


@dataclass(frozen=True)
class CallFormat:
    """One way in which models write calls."""

    name: str
    signs: tuple[tuple[str, ...], ...]
    """Groups of texts: a chat template that has all texts of any one group is of this format."""
    openers: Mapping[str, CallBody] = field(default_factory=dict)
    """What follows each text that begins a call, wherever it stands."""
    leading: Mapping[str, CallBody] = field(default_factory=dict)
    """What begins with each character if it begins the answer."""
    dropped: tuple[str, ...] = ()
    """Texts around calls that say nothing more."""
    around: tuple[str, str] = ("", "")
    """Texts before the first and after the last call of a model that must call."""
    makes_id: Callable[[str], str] = "call_{}".format
    """Function that makes the id of a call from 24 random hexadecimal digits."""

    @property
    def marks(self) -> tuple[str, ...]:
        """All texts of the format; special tokens that are part of one must stay in the text."""
        bodies = (*self.openers.values(), *self.leading.values())
        return (*self.openers, *self.dropped, *(mark for body in bodies for mark in body.marks))


_QWEN_CODER = TaggedCalls(
    function="<function=",
    name_end=">",
    key="<parameter=",
    key_end=">",
    value="",
    value_end="</parameter>",
    function_end="</function>",
    closer="</tool_call>",
    own_lines=True,
)
_GLM = TaggedCalls(
    function="",
    name_end="",
    key="<arg_key>",
    key_end="</arg_key>",
    value="<arg_value>",
    value_end="</arg_value>",
    function_end="",
    closer="</tool_call>",
    own_lines=False,
)
_MINIMAX = TaggedCalls(
    function='<invoke name="',
    name_end='">',
    key='<parameter name="',
    key_end='">',
    value="",
    value_end="</parameter>",
    function_end="</invoke>",
    closer="</minimax:tool_call>",
    own_lines=False,
    holds_several=True,
)
_BARE_JSON = JsonCalls(needs_known_names=True, form=PARAMETERS)
_COHERE = '{{"tool_call_id": "{number}", "tool_name": {name}, "parameters": {arguments}}}'
_BARE_PYTHON = PythonCalls(needs_known_names=True)

# The first format whose signs a template has is taken: templates mention formats of others in examples.
CALL_FORMATS = (
    CallFormat(HARMONY, (("<|channel|>", "<|message|>"),), dropped=HARMONY_MARKS),
    CallFormat("gemma", (("<|tool_call>",),), {"<|tool_call>": GemmaCall('<|"|>', "<tool_call|>")}),
    CallFormat(
        "functiongemma",
        (("<start_function_call>",),),
        {"<start_function_call>": GemmaCall("<escape>", "<end_function_call>")},
    ),
    CallFormat(
        "deepseek",
        (("<｜tool▁call▁begin｜>",),),
        {"<｜tool▁call▁begin｜>": DeepSeekCall("<｜tool▁sep｜>", "<｜tool▁call▁end｜>")},
        dropped=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    CallFormat(
        "kimi",
        (("<|tool_call_begin|>",),),
        {"<|tool_call_begin|>": KimiCall("<|tool_call_argument_begin|>", "<|tool_call_end|>")},
        dropped=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        around=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ),
    # Mistral's templates accept ids of exactly nine letters and digits.
    CallFormat("mistral", (("[TOOL_CALLS]",),), {"[TOOL_CALLS]": MistralCalls()}, makes_id="{:.9}".format),
    CallFormat("minimax", (("<minimax:tool_call>",),), {"<minimax:tool_call>": _MINIMAX}),
    CallFormat(
        "qwen3-coder",
        (("<function=", "<parameter="),),
        {"<tool_call>": _QWEN_CODER, "<function=": replace(_QWEN_CODER, begins_with_function=True)},
    ),
    CallFormat("glm", (("<arg_key>",),), {"<tool_call>": _GLM}),
    CallFormat("lfm2", (("<|tool_call_start|>",),), {"<|tool_call_start|>": PythonCalls("<|tool_call_end|>")}),
    CallFormat(
        "cohere",
        (("<|START_ACTION|>",),),
        {"<|START_ACTION|>": JsonCalls("<|END_ACTION|>", form=_COHERE, brackets=("[\n    ", ",\n    ", "\n]"))},
    ),
    CallFormat("phi", (("<|tool_call|>",),), {"<|tool_call|>": JsonCalls("<|/tool_call|>", brackets=LIST)}),
    CallFormat("hermes", (("<tool_call>",),), {"<tool_call>": JsonCalls("</tool_call>", line="\n")}),
    CallFormat(
        "llama",
        (("<|python_tag|>",), ("<|start_header_id|>", '"parameters": '), ("<|header_start|>", '"parameters": ')),
        {"<|python_tag|>": PythonTag()},
        leading={"{": _BARE_JSON, "[": _BARE_PYTHON},
    ),
)
REASONING_FORMATS = (
    ReasoningFormat("gemma", "<|channel>thought\n", "<channel|>", anywhere=True),
    ReasoningFormat("cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("seed", "<seed:think>", "</seed:think>"),
    ReasoningFormat("think", "<think>", "</think>"),
)
CALL_FORMAT_NAMES = tuple(kind.name for kind in CALL_FORMATS)
REASONING_FORMAT_NAMES = (HARMONY, *(kind.name for kind in REASONING_FORMATS))


@dataclass(frozen=True)
class AnswerFormat:
    """How a model writes calls and thinking."""

    calls: CallFormat | None = None
    reasoning: ReasoningFormat | None = None
    is_harmony: bool = False
    """Whether answers consist of messages in channels, which hold calls and thinking both."""

    @property
    def marks(self) -> tuple[str, ...]:
        """All texts of the format; special tokens that are part of one must stay in the text."""
        calls = self.calls.marks if self.calls is not None else ()
        return (*calls, *(self.reasoning.marks if self.reasoning is not None else ()))


def find_format(
    template: str, tool_parser: str = AUTO, reasoning_parser: str = AUTO, *, writes_tools: bool = True
) -> AnswerFormat:
    """Return the format of a model with this chat template, or the ones that are named.  Raises BadRequest.

    The tools of a template that does not write them are described, with calls in the format `DESCRIBED`.
    """
    by_name = {kind.name: kind for kind in CALL_FORMATS}
    if tool_parser == AUTO:
        calls = next((kind for kind in CALL_FORMATS if _has_signs(template, kind)), None)
        if not writes_tools and (calls is None or calls.name != HARMONY):
            calls = by_name[DESCRIBED]
    else:
        calls = _named("tool parser", tool_parser, by_name)
    if HARMONY in (reasoning_parser, calls.name if calls is not None else ""):
        return AnswerFormat(by_name[HARMONY], is_harmony=True)
    if reasoning_parser == AUTO:
        reasoning = next((kind for kind in REASONING_FORMATS if kind.closer in template), None)
    else:
        reasoning = _named("reasoning parser", reasoning_parser, {kind.name: kind for kind in REASONING_FORMATS})
    return AnswerFormat(calls, reasoning)


def _has_signs(template: str, kind: CallFormat) -> bool:
    return any(all(sign in template for sign in signs) for signs in kind.signs)


def _named(what: str, name: str, kinds: Mapping[str, Kind]) -> Kind | None:
    if name == NONE:
        return None
    if name not in kinds:
        raise BadRequest(f"there is no {what} '{name}': give {AUTO}, {NONE}, or one of {', '.join(kinds)}")
    return kinds[name]
