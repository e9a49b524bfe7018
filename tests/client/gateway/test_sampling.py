"""What a request does not name, the model's publisher decides: sampling, and the length of an answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from treeswarm.errors import ModelError
from treeswarm.model_files import read_generation_defaults
from treeswarm.model_sources.generation_config import GenerationDefaults
from treeswarm.protocol.records import NodeRecord
from treeswarm.protocol.spans import Span
from treeswarm.protocol.text_rules import TextRules
from treeswarm_bench.benchmarks.parts.fake_node import FakeNode
from treeswarm_client.gateway.generation_request import SamplingOptions
from treeswarm_client.gateway.length import LEAST, default_length, free_room
from treeswarm_client.gateway.sampling import bad_word_tokens, sampling_options

# As Qwen2.5 publishes it.
PUBLISHED = {
    "do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
    "eos_token_id": [1, 2], "transformers_version": "4.37.0",
}  # fmt: skip


def defaults_in(folder: Path, content: Any) -> GenerationDefaults:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return read_generation_defaults(folder)


def options(named: SamplingOptions, defaults: GenerationDefaults) -> dict[str, Any]:
    return sampling_options(named, defaults, lambda text: [ord(letter) for letter in text])


def test_published_values_hold_where_a_request_names_none(tmp_path: Path) -> None:
    defaults = defaults_in(tmp_path, PUBLISHED)
    unnamed = options(SamplingOptions({}, 5, {}), defaults)
    expected = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 5, "rules": TextRules(repetition_penalty=1.05)}
    assert unnamed == expected
    named = SamplingOptions({"temperature": 1.0, "top_k": 0}, 5, {"repetition_penalty": 1.0})
    assert options(named, defaults) == expected | {"temperature": 1.0, "top_k": 0, "rules": TextRules()}


def test_without_a_file_openai_s_defaults_hold(tmp_path: Path) -> None:
    defaults = read_generation_defaults(tmp_path)
    assert options(SamplingOptions({}, 5, {}), defaults) == {"temperature": 1.0, "seed": 5, "rules": TextRules()}
    assert defaults.transformers_settings() == {"temperature": 0.0}


def test_greedy_texts_ignore_filters_of_samples(tmp_path: Path) -> None:
    """They need no node that knows rules: the likeliest token passes every filter."""
    defaults = defaults_in(tmp_path, {"min_p": 0.1, "no_repeat_ngram_size": 3})
    greedy = options(SamplingOptions({"temperature": 0.0}, 5, {"typical_p": 0.5}), defaults)
    assert greedy["rules"] == TextRules(no_repeat_ngram_size=3)


def test_transformers_samples_only_where_the_file_says_so(tmp_path: Path) -> None:
    defaults = defaults_in(tmp_path, {"do_sample": True, "top_p": 0.9})
    assert defaults.transformers_settings() == {"temperature": 1.0, "top_k": 50, "top_p": 0.9}
    assert defaults_in(tmp_path, {"temperature": 0.6}).transformers_settings() == {"temperature": 0.0}


@pytest.mark.parametrize("content", [{"top_p": "high"}, {"temperature": True}, {"top_p": 2}, {"min_p": -1}, [], None])
def test_file_that_cannot_be_followed_is_an_error_of_the_model(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        defaults_in(tmp_path, content)


def test_bad_words_are_banned_with_and_without_a_space() -> None:
    def encode(text: str) -> list[int]:
        words = {"no": [5], " no": [6], "nono": [5, 5], " nono": [6, 5], "x": [7], " x": [9, 7]}
        return words[text]

    assert bad_word_tokens(["no", " nono"], encode) == ((5,), (6,), (5, 5), (6, 5))
    assert bad_word_tokens(["x"], encode) == ((7,),)  # its own tokens follow a space that is a token of its own


def record(start: int, end: int, free: int, total: int = 10_000) -> NodeRecord:
    return FakeNode().record(span=Span(start, end), free_tokens=free, total_tokens=total).record


def test_room_is_that_of_the_fullest_part() -> None:
    records = [record(0, 2, 8000), record(0, 2, 500), record(2, 4, 3000)]
    assert free_room(records, 4, 0) == 3000
    assert free_room(records, 4, 9000) == 1000  # what the nodes have announced is older than what was reserved
    assert free_room(records[:2], 4, 0) == 0
    assert free_room([], 4, 0) == 0


def test_length_is_what_fits_and_leaves_room_for_others() -> None:
    assert default_length(2000, 131_072) == 2000
    assert default_length(100_000, 131_072) == 16_384
    assert default_length(100_000, 500) == LEAST
    assert default_length(-5, 131_072) == 1
