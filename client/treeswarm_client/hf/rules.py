"""transformers' arguments that change logits, as rules that the tail applies."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from treeswarm.errors import BadRequest
from treeswarm.protocol.text_rules import TextRules

Word = tuple[int, ...]


@dataclass(frozen=True)
class RuleArguments:
    """The rules of a `generate` call, and the length of a text before which no end token is chosen."""

    rules: TextRules = TextRules()
    min_length: int = 0
    """Number of tokens with the prompt and its padding."""

    def for_prompt(self, length: int) -> TextRules:
        """Return the rules of texts whose prompts are padded to `length`."""
        return replace(self.rules, min_tokens=max(self.rules.min_tokens, self.min_length - length))


def read_rules(get: Callable[[str], Any], eos_ids: Word, *, sampling: bool) -> RuleArguments:
    """Return the rules that `get` gives by transformers' names; None stands for an argument that was not given.

    Raises BadRequest for values that transformers would not take, and for biases of several tokens.
    """
    singles, words = _biases(get("sequence_bias"))
    words += [word for word in _words("bad_words_ids", get("bad_words_ids")) if word not in {(eos,) for eos in eos_ids}]
    words += [(token,) for token in _ids("suppress_tokens", get("suppress_tokens"))]
    rules = TextRules(
        repetition_penalty=_number("repetition_penalty", get("repetition_penalty"), 1.0),
        logit_bias=tuple(singles.items()),
        no_repeat_ngram_size=_whole("no_repeat_ngram_size", get("no_repeat_ngram_size")),
        bad_words=tuple(dict.fromkeys(words)),
        min_tokens=_whole("min_new_tokens", get("min_new_tokens")) if eos_ids else 0,
        min_p=_number("min_p", get("min_p"), 0.0) if sampling else 0.0,
        typical_p=_number("typical_p", get("typical_p"), 1.0) if sampling else 1.0,
    )
    return RuleArguments(rules, _whole("min_length", get("min_length")) if eos_ids else 0)


def _biases(value: Any) -> tuple[dict[int, float], list[Word]]:
    """Return the biases of single tokens, and the sequences whose bias is −inf: these are bad words."""
    pairs = value.items() if isinstance(value, Mapping) else value or ()
    singles: dict[int, float] = {}
    words: list[Word] = []
    for sequence, bias in _pairs(pairs):
        added = _number("sequence_bias", bias, 0.0)
        if added == float("-inf"):
            words.append(sequence)
        elif len(sequence) == 1:
            singles[sequence[0]] = added
        else:
            raise BadRequest(
                f"sequence_bias gives {list(sequence)} a bias of {added}: a swarm adds biases to single tokens, and "
                "-inf to sequences"
            )
    return singles, words


def _pairs(pairs: Iterable[Any]) -> Iterable[tuple[Word, Any]]:
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:  # a sequence and its bias
            raise BadRequest(f"sequence_bias has {pair!r}: give pairs of token ids and a bias")
        yield _ids("sequence_bias", pair[0]), pair[1]


def _words(name: str, value: Any) -> list[Word]:
    words = [_ids(name, word) for word in value or ()]
    if not all(words):
        raise BadRequest(f"{name} has an empty sequence: leave it out")
    return words


def _ids(name: str, value: Any) -> Word:
    value = value.tolist() if hasattr(value, "tolist") else value
    ids = tuple(value) if isinstance(value, list | tuple | set) else () if value is None else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise BadRequest(f"{name} has {value!r}: give token ids")
    return ids


def _whole(name: str, value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequest(f"{name} is {value!r}: give a whole number")
    return value


def _number(name: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{name} is {value!r}: give a number")
    return float(value)
