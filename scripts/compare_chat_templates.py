"""Compare how chat templates are written here and by transformers: python scripts/compare_chat_templates.py FILE...

FILE is a Jinja file, a wheel with Jinja files, or a Python file with templates as strings in it (also inside a wheel).
`pip download --no-deps trl unsloth` brings about a hundred templates of real models.  Each writes ten conversations,
with tools, thinking, system turns and a message to continue.  An answer with a call, as each template writes it, is
then read in the format that the template shows.  Exits with 1 if a text, a refusal or a call that is read differs.
"""

import argparse
import ast
import copy
import json
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from treeswarm.errors import BadRequest
from treeswarm_client.chat_template.environment import compile_template
from treeswarm_client.chat_template.template import ChatTemplate, CompiledTemplate
from treeswarm_client.tool_calls.events import ArgumentsText, CallBegun
from treeswarm_client.tool_calls.formats import find_format
from treeswarm_client.tool_calls.offered import OfferedTools
from treeswarm_client.tool_calls.parser import AnswerParser

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Name, <b> & 'quotes'"},
        "days": {"type": "integer", "description": "Number of days"},
        "unit": {"type": "string", "enum": ["C", "F"], "description": "Unit"},
    },
    "required": ["city"],
}
SUM = {
    "type": "object",
    "properties": {"numbers": {"type": "array", "items": {"type": "number"}, "description": "Summands"}},
    "required": ["numbers"],
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}
    for name, about, parameters in (("get_weather", "Weather of a city.", WEATHER), ("add", "Add numbers.", SUM))
]
SYSTEM = {"role": "system", "content": " Be kind & <brief>.\n"}
USER = {"role": "user", "content": "Was gibt's in Zürich, 世界?"}


def call(number: int, function: str, **arguments: object) -> dict[str, Any]:
    """Return a call as OpenAI's messages have it: its arguments are text."""
    text = json.dumps(arguments, ensure_ascii=False)
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": function, "arguments": text}}


def assistant(**fields: object) -> dict[str, Any]:
    return {"role": "assistant", **fields}


def result(number: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{number:05d}", "content": content}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "user": ([USER], {}),
    "system": ([SYSTEM, USER], {}),
    "talk": ([SYSTEM, USER, assistant(content="Rain."), {"role": "user", "content": "And tomorrow?"}], {}),
    "tools": ([SYSTEM, USER], {"tools": TOOLS}),
    "call and result": (
        [
            SYSTEM,
            USER,
            assistant(content=None, tool_calls=[call(1, "get_weather", city="Zürich <b>", days=2)]),
            result(1, '{"rain": true}'),
        ],
        {"tools": TOOLS},
    ),
    "two calls": (
        [
            USER,
            assistant(content="I look.", tool_calls=[call(1, "get_weather", city="Bern"), call(2, "add", numbers=[1])]),
            result(1, "sun"),
            result(2, "1"),
            assistant(content="Sun, and 1."),
            USER,
        ],
        {"tools": TOOLS},
    ),
    "thinking": (
        [SYSTEM, USER, assistant(reasoning_content="The user asks.\nHm.", content="Rain."), USER],
        {"template_kwargs": {"enable_thinking": True, "reasoning_effort": "high"}},
    ),
    "no thinking": ([USER], {"template_kwargs": {"enable_thinking": False}, "tools": TOOLS[:1]}),
    "continue": ([SYSTEM, USER, assistant(content="It will be ")], {"continue_final_message": True}),
    "continue thinking": (
        [USER, assistant(reasoning_content="Let me", content="")],
        {"continue_final_message": "reasoning_content"},
    ),
}


def find_templates(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Yield name and text of every template in the files, each text once."""
    seen: set[str] = set()
    for name, text in (found for file in files for found in _texts(file)):
        for title, template in _templates_in(name, text):
            if template not in seen:
                seen.add(template)
                yield title, template


def _texts(file: Path) -> Iterator[tuple[str, str]]:
    if file.suffix != ".whl":
        yield file.name, file.read_text("utf-8")
        return
    with zipfile.ZipFile(file) as wheel:
        for name in wheel.namelist():
            if name.endswith((".jinja", "/chat_templates.py")):
                yield name, wheel.read(name).decode()


def _templates_in(name: str, text: str) -> Iterator[tuple[str, str]]:
    if not name.endswith(".py"):
        yield name, text
        return
    for node in ast.parse(text).body:  # read, never run
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.JoinedStr | ast.BinOp):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                continue
            title = ast.unparse(node.targets[0])
            if isinstance(value, str) and "{%" in value and title.endswith("_template") and "ollama" not in title:
                yield f"{name}:{title}", value


def render_here(template: ChatTemplate, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str | None:
    """Return the text, or None if the messages are refused."""
    try:
        return template.render(messages, **options)
    except BadRequest:
        return None


def render_there(
    tokenizer: Any, source: str, messages: list[dict[str, Any]], options: Mapping[str, Any]
) -> tuple[str, str | None]:
    """Return in which form transformers takes calls' arguments, objects or else text, and the text or None."""
    variables = dict(options)
    variables |= variables.pop("template_kwargs", {})
    variables["add_generation_prompt"] = not variables.get("continue_final_message")
    with_objects = copy.deepcopy(messages)
    for message in with_objects:
        for made in message.get("tool_calls") or ():
            made["function"]["arguments"] = json.loads(made["function"]["arguments"])
    for form, wanted in (("objects", with_objects), ("text", messages)):
        try:
            text = tokenizer.apply_chat_template(wanted, chat_template=source, tokenize=False, **variables)
        except Exception:  # a template may raise anything
            continue
        return form, text
    return "refused", None


def compare(templates: Iterable[tuple[str, str]], tokenizer: Any) -> Iterator[tuple[str, str, str]]:
    """Yield template, conversation and outcome of every comparison."""
    for name, source in templates:
        compiled = CompiledTemplate(compile_template(source), source, SPECIAL)
        for title, (messages, options) in CONVERSATIONS.items():
            given = [_in_parts(message) for message in messages] if compiled.takes_parts else messages
            form, theirs = render_there(tokenizer, source, given, options)
            ours = render_here(ChatTemplate(compiled), messages, options)
            if theirs == ours:
                yield name, title, "both refuse" if ours is None else f"identical, arguments as {form}"
            else:
                yield name, title, "only here" if theirs is None else "DIFFERENT"


def read_back(source: str) -> str | None:
    """Write an answer with a call, read it character by character, and return what became of the call.

    Returns None if the template writes no call, or none after the prompt for an answer.
    """
    template = ChatTemplate(CompiledTemplate(compile_template(source), source, SPECIAL))
    made = call(1, "get_weather", city='Zü"r <b>', days=2)
    for fields in ({"content": "I look."}, {"content": ""}):
        prompt = render_here(template, [USER], {"tools": TOOLS})
        whole = render_here(
            template, [USER, assistant(**fields, tool_calls=[made])], {"tools": TOOLS, "add_generation_prompt": False}
        )
        if prompt is not None and whole is not None and "get_weather" in (answer := _after(prompt, whole)):
            form = find_format(source)
            parser = AnswerParser(form, OfferedTools.of(TOOLS))
            events = [event for character in answer for event in parser.feed(character)] + parser.finish()
            name = "".join(event.name for event in events if isinstance(event, CallBegun))
            arguments = "".join(event.text for event in events if isinstance(event, ArgumentsText))
            same = name == "get_weather" and json.loads(arguments) == json.loads(made["function"]["arguments"])
            return "read back" if same else "READ AS ANOTHER"
    return None


def _after(prompt: str, whole: str) -> str:
    """Return what of a conversation follows the prompt; a prompt may end with thinking that an answer leaves out."""
    same = next((at for at, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(prompt))
    return whole[same:] if same == len(prompt) else whole[whole.rfind("\n", 0, same) + 1 :]


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL)
    templates = list(find_templates(parser.parse_args().files))
    outcomes = list(compare(templates, tokenizer))
    for name, title, outcome in outcomes:
        if outcome in ("DIFFERENT", "only here"):
            print(f"{outcome}: {title}, {name}")
    counts = Counter(outcome for _, _, outcome in outcomes)
    calls = {name: outcome for name, source in templates if (outcome := read_back(source))}
    for name, outcome in calls.items():
        if outcome == "READ AS ANOTHER":
            print(f"{outcome}: {name}")
    counts.update(f"calls {outcome}" for outcome in calls.values())
    print(json.dumps({"templates": len(templates), "texts": len(outcomes), **counts}))
    return 1 if counts["DIFFERENT"] or counts["calls READ AS ANOTHER"] else 0


if __name__ == "__main__":
    sys.exit(main())
