"""How a request's tokens are chosen: what it names, over what the model's publisher recommends.  Pure."""

from collections.abc import Callable, Sequence
from typing import Any

from treeswarm.model_sources.generation_config import GenerationDefaults, rules_from
from treeswarm_client.gateway.generation_request import SamplingOptions

# OpenAI's default, where neither the request nor the model says another one.
DEFAULT_TEMPERATURE = 1.0


def sampling_options(
    named: SamplingOptions, defaults: GenerationDefaults, encode: Callable[[str], list[int]]
) -> dict[str, Any]:
    """Return the options of `SwarmClient.stream` that say how tokens are chosen.

    `encode` turns a text into token ids without special ones.  Raises BadRequest for values that do not fit together.
    """
    settings = {"temperature": DEFAULT_TEMPERATURE, **defaults.settings, **named.settings}
    rules = {**defaults.rules, **named.rules, "bad_words": bad_word_tokens(named.bad_words, encode)}
    return {**settings, "seed": named.seed, "rules": rules_from(rules, temperature=settings["temperature"])}


def bad_word_tokens(words: Sequence[str], encode: Callable[[str], list[int]]) -> tuple[tuple[int, ...], ...]:
    """Return the token sequences of words, at the beginning of a text and after a space, as vLLM forms them."""
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        if plain := tuple(encode(bare)):
            sequences[plain] = None
        spaced = tuple(encode(f" {bare}"))
        # A tokenizer that writes the space as a token of its own adds nothing: the word's own tokens follow it.
        if spaced and (not plain or (spaced[0] != plain[0] and len(spaced) == len(plain))):
            sequences[spaced] = None
    return tuple(sequences)
