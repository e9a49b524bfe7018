"""Texts and conversations to token ids, and token ids to text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from treeswarm.errors import BadRequest, TooLong
from treeswarm.model_files import load_tokenizer
from treeswarm_client.chat_template import ChatTemplate, MessageDict, load_chat_template

# A text is refused unread if its tokens would have to be so many times as long as the longest one: a tokenizer may drop
# or combine characters before it divides a text, though few of them.
LEAST_SHARE = 4


@dataclass(frozen=True, eq=False)
class PromptEncoder:
    """A model's tokenizer and chat template."""

    model: str
    """The model's name, for error messages."""
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    """The model's chat template, or None if it has none."""
    max_positions: int | None = None
    """Number of tokens of the model's context, or None if that is not known here."""

    @cached_property
    def most_characters(self) -> int | None:
        """Number of characters beyond which a text surely does not fit, or None if it is not known."""
        if self.max_positions is None:
            return None
        return self.max_positions * LEAST_SHARE * max(map(len, self.tokenizer.get_vocab()), default=1)

    def encode(self, prompt: str, *, special: bool = True) -> list[int]:
        """Return the prompt's token ids, with `special` after those that begin every text of the model.

        Raises BadRequest for text that is not Unicode, and TooLong for text that cannot fit into the context.
        """
        return self._ids(prompt, special=special)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def encode_chat(
        self,
        messages: Sequence[MessageDict],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool | str = False,
    ) -> list[int]:
        """Return the token ids of a conversation, up to where the model's reply begins; see `ChatTemplate.render`.

        Raises BadRequest if there is no chat template, or if it refuses the messages, and TooLong as `encode` does.
        """
        if self.chat is None:
            raise BadRequest(f"'{self.model}' has no chat template: it only continues texts, as `swarm generate` does")
        text = self.chat.render(
            messages, tools=tools, template_kwargs=template_kwargs, continue_final_message=continue_final_message
        )
        return self._ids(text, special=False)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        if self._cannot_fit(len(text)):
            raise TooLong(
                f"a text of {len(text)} characters cannot fit into the model's context of {self.max_positions} tokens: "
                "shorten it"
            )
        try:
            # A batch, because `encode` holds the interpreter's lock: a text of 4 MB would stop the whole program.
            return list(self.tokenizer.encode_batch([text], add_special_tokens=special)[0].ids)
        except (TypeError, UnicodeError):  # half of a surrogate pair, as JSON may bring it
            raise BadRequest("the text contains lone surrogates, which are no characters: send valid Unicode") from None

    def _cannot_fit(self, characters: int) -> bool:
        # A short text fits whatever its tokens are: only a long one is worth reading the whole vocabulary.
        if self.max_positions is None or characters <= self.max_positions:
            return False
        return self.most_characters is not None and characters > self.most_characters


def load_prompt_encoder(model: str, folder: Path, max_positions: int | None = None) -> PromptEncoder:
    """Return the encoder of the model in `folder`, whose context has `max_positions` tokens.  Raises ModelError."""
    file = folder / "tokenizer.json"
    changed = file.stat().st_mtime_ns if file.exists() else 0
    return PromptEncoder(model, _load_tokenizer(folder, changed), load_chat_template(folder), max_positions)


@lru_cache(maxsize=1)
def _load_tokenizer(folder: Path, changed: int) -> Tokenizer:
    """Load a tokenizer once for the check of a prompt and for the client: a large one takes half a second."""
    return load_tokenizer(folder)


def check_request(
    prompt: Sequence[int], max_new_tokens: int, vocab_size: int, max_positions: int, *, least: int = 1
) -> None:
    """Raise BadRequest if a model of these sizes cannot continue the prompt with so many tokens.  Pure.

    At least `least` tokens are generated: none where the prompt alone is scored.
    """
    if not prompt:
        raise BadRequest("the prompt is empty: give some text to continue")
    if max_new_tokens < least:
        raise BadRequest(f"max_new_tokens is {max_new_tokens}: give at least {least}")
    if (total := len(prompt) + max_new_tokens) > max_positions:
        raise TooLong(
            f"{len(prompt)} prompt tokens and {max_new_tokens} new ones are {total}, the model's context is "
            f"{max_positions}: shorten the prompt or ask for fewer new tokens"
        )
    if any(not 0 <= token < vocab_size for token in prompt):
        raise BadRequest(f"the prompt has token ids outside the vocabulary of {vocab_size}")
