"""Rules on the wire: what is out of bounds is refused, and both ends compute the same digest."""

from typing import Any

import pytest
from hypothesis import given
from tests.support.random_rules import rules_requests

from treeswarm.errors import BadRequest, Malformed
from treeswarm.protocol.text_rules import RulesRequest
from treeswarm.wire import treeswarm_pb2 as pb
from treeswarm.wire.rules_codec import rules_in, rules_out


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt_length": 2**23}, "prompt_length"),
        ({"bias_tokens": bytes(8), "biases": [1.0]}, "1 biases for 2 tokens"),
        ({"bias_tokens": bytes(8), "biases": [1.0, 1.0]}, "names a token twice"),
        ({"bias_tokens": bytes(4 * 1025), "biases": [1.0] * 1025}, "bias_tokens"),
        ({"bad_word_lengths": b"\x02\0\0\0", "bad_word_tokens": bytes(4)}, "1 tokens for bad words of 2"),
        ({"bad_word_lengths": bytes(4)}, "a bad word is empty"),
        ({"end_tokens": b"abc"}, "end_tokens"),
        ({"grammar_kind": "xml"}, "unknown kind of grammar"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
    ],
)
def test_rules_out_of_bounds_are_malformed(changes: dict[str, Any], field: str) -> None:
    valid = {"repetition_penalty": 1.0, "typical_p": 1.0}
    assert rules_in(pb.RulesRequest(**valid)).rules.neutral
    with pytest.raises((Malformed, BadRequest), match=field):
        rules_in(pb.RulesRequest(**valid | changes))


@given(rules_requests)
def test_rules_have_the_same_digest_at_both_ends(request: RulesRequest) -> None:
    assert rules_in(rules_out(request)).digest == request.digest
