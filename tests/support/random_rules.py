"""Random rules of texts."""

from typing import get_args

from hypothesis import strategies as st

from treeswarm.protocol.text_rules import Grammar, GrammarKind, RulesRequest, TextRules

tokens = st.integers(0, 2**32 - 1)
grammars = st.builds(Grammar, st.sampled_from(get_args(GrammarKind)), st.text(max_size=40))
rules = st.builds(
    TextRules,
    repetition_penalty=st.floats(0.01, 100.0),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100), max_size=4).map(lambda biases: tuple(biases.items())),
    min_p=st.floats(0, 1),
    typical_p=st.floats(0.01, 1),
    no_repeat_ngram_size=st.integers(0, 9),
    bad_words=st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    min_tokens=st.integers(0, 99),
    end_tokens=st.lists(tokens, max_size=3).map(tuple),
    grammar=st.none() | grammars,
)
rules_requests = st.builds(RulesRequest, rules, st.integers(0, 2**22))
