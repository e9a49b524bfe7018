"""An answer that must call a tool follows a grammar, in every format, and what it writes is read as a call."""

import re

import pytest
from llguidance import LLMatcher, LLTokenizer
from tests.client.tool_calls.test_formats import ADD, WEATHER, WRITTEN
from tokenizers import AddedToken, Tokenizer

from treeswarm.grammar.sources import source_of
from treeswarm.model_files import load_tokenizer, resolve_model
from treeswarm_client.tool_calls.formats import CALL_FORMAT_NAMES, find_format
from treeswarm_client.tool_calls.offered import OfferedTools
from treeswarm_client.tool_calls.required import required_grammar

TOOLS = OfferedTools(
    {
        "weather": {"type": "object", **WEATHER, "required": ["city"]},
        "add": {"type": "object", **ADD, "required": ["numbers"]},
    }
)
# Marks that are special tokens in the tokenizers of their families.
SPECIAL = (
    "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<|call|>", "[TOOL_CALLS]", "<|tool_call>",
    "<tool_call|>", '<|"|>', "<|tool_call_start|>", "<|START_ACTION|>", "<|END_ACTION|>", "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>", "<|tool_call_begin|>", "[THINK]", "[/THINK]",
)  # fmt: skip


class Follower:
    """Follows a grammar with the demo's tokenizer, with or without special tokens."""

    def __init__(self, special: tuple[str, ...]) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(resolve_model("demo"))
        self.tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        self.special = {text: self.tokenizer.token_to_id(text) for text in special}
        self.library = LLTokenizer(self.tokenizer.to_str())

    def matcher(self, name: str, *, is_thinking: bool = False, several: bool = True) -> LLMatcher:
        form = find_format("", name, WRITTEN[name][0])
        grammar = required_grammar(form, TOOLS, self.special, several=several, is_thinking=is_thinking)
        matcher = LLMatcher(self.library, source_of(grammar))
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def takes(self, matcher: LLMatcher, text: str) -> bool:
        """Return whether a grammar allows a text as a whole."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.fixture(scope="module", params=[(), SPECIAL], ids=["plain marks", "special tokens"])
def follower(request: pytest.FixtureRequest) -> Follower:
    return Follower(request.param)


@pytest.mark.parametrize("name", CALL_FORMAT_NAMES)
def test_grammar_takes_what_the_family_writes(name: str, follower: Follower) -> None:
    _, text = WRITTEN[name]
    silent = text.replace("<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>", "")
    silent = re.sub(r"I look\.\n?", "", silent).replace("'", '"')
    one_call = name in ("llama", "harmony")  # of these families, an answer that must call has one call
    if one_call:
        silent = re.split(r"; |<\|call\|>", silent)[0]
    assert follower.takes(follower.matcher(name, several=not one_call), silent.lstrip("\n").rstrip("\n"))
    assert not follower.takes(follower.matcher(name), "It is sunny.")
    assert not follower.takes(follower.matcher(name), silent.replace("weather", "whether"))


def test_thinking_that_the_prompt_began_ends_before_the_call(follower: Follower) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"numbers": [1]}}\n</tool_call>'
    assert follower.takes(follower.matcher("hermes", is_thinking=True), f"Hm </thin.</think>\n\n{call}")
    assert not follower.takes(follower.matcher("hermes", is_thinking=True), call)
    assert follower.takes(follower.matcher("hermes"), call)
    assert not follower.takes(follower.matcher("hermes", several=False), f"{call}\n{call}")
