"""Which token each id means, and whether two models agree on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from treeswarm.errors import ModelError
from treeswarm.model_files import read_json, tokenizer_digest
from treeswarm.model_sources.tokenizer_files import TOKENIZER, tokenizer_folder


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a tokenizer by their ids."""

    text: Mapping[int, str]
    """Tokens of which texts are made; some tokenizers list their special tokens here too."""
    added: Mapping[int, str]
    """Tokens that were added to those, as special tokens are."""

    def token(self, token_id: int) -> str | None:
        """Return the token of an id, or None if there is none."""
        return self.added.get(token_id, self.text.get(token_id))


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read the vocabulary of a model directory.  Raises ModelError."""
    path = tokenizer_folder(folder) / TOKENIZER
    content = read_json(path, "")
    try:
        tokens = content["model"]["vocab"]
        # Unigram models have a list of tokens with their scores, the others a number for each token.
        by_id = {int(number): token for token, number in tokens.items()} if isinstance(tokens, dict) else {
            number: str(token) for number, (token, _) in enumerate(tokens)
        }  # fmt: skip
        added = {int(token["id"]): str(token["content"]) for token in content.get("added_tokens") or ()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} has no vocabulary ({error}): download it again") from None
    return Vocabulary(by_id, added)


def same_texts(one: Vocabulary, other: Vocabulary) -> bool:
    """Return whether two vocabularies give every id of a text the same token.  Pure.

    Special tokens may differ, as those of two releases of a family do: at such a token a draft guesses wrongly, and
    nothing else happens.  Merges may differ too: a draft sees ids, and never splits a text.
    """
    added = one.added.keys() | other.added.keys()
    texts = ({number: token for number, token in each.text.items() if number not in added} for each in (one, other))
    return next(texts) == next(texts)


def share_vocabulary(draft: Path, target: Path) -> bool:
    """Return whether the ids of two model directories mean the same tokens.  Raises ModelError."""
    if tokenizer_digest(draft) == tokenizer_digest(target):
        return True
    return same_texts(read_vocabulary(draft), read_vocabulary(target))
