"""The schemas of `swarm bench grammars`, followed by random tokens instead of a model."""

import json
import random

import jsonschema
import pytest
from tests.support.grammar_tokenizers import END, byte_level, compiler_for

from treeswarm.grammar.bits import allowed_tokens
from treeswarm.grammar.compiler import GrammarCompiler
from treeswarm.protocol.text_rules import Grammar
from treeswarm_bench.benchmarks.grammars import random_schema, widened_tokenizer


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return compiler_for(byte_level())


def test_random_texts_of_a_hundred_schemas_are_valid(compiler: GrammarCompiler) -> None:
    """Whatever tokens are chosen among those allowed, every text that ends is valid; forced runs change none."""
    chance, tokenizer = random.Random(100), byte_level()
    end = tokenizer.token_to_id(END)
    finished = forced = 0
    for _ in range(100):
        schema = random_schema(chance)
        masks, text = compiler.begin(Grammar("json_schema", json.dumps(schema)), [end]), list[int]()
        while len(text) < 250 and end not in text:
            run = masks.forced_run(text, 64)
            forced += len(run)
            text += run or [chance.choice(allowed_tokens(masks.after(text, [()])[0]).tolist())]
        if text[-1] == end:
            jsonschema.validate(json.loads(tokenizer.decode(text[:-1])), schema)
            finished += 1
    assert finished > 80
    assert forced > 1000


def test_a_widened_tokenizer_reads_the_same_texts() -> None:
    wide, narrow = widened_tokenizer(byte_level(), 600), byte_level()
    assert wide.get_vocab_size() == 599
    assert narrow.decode(narrow.encode("alpha beta").ids) == wide.decode(wide.encode("alpha beta").ids)
