"""Texts and conversations to token ids, and token ids to text."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from treeswarm.errors import BadRequest
from treeswarm_client.chat_template import ChatTemplate, MessageDict


@dataclass(frozen=True, eq=False)
class PromptEncoder:
    """A model's tokenizer and chat template."""

    model: str
    """The model's name, for error messages."""
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    """The model's chat template, or None if it has none."""

    def encode(self, prompt: str) -> list[int]:
        """Return the prompt's token ids, special tokens included.  Raises BadRequest for text that is not Unicode."""
        return self._ids(prompt, special=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def encode_chat(self, messages: Sequence[MessageDict]) -> list[int]:
        """Return the token ids of a conversation, up to where the model's reply begins.

        Raises BadRequest if there is no chat template, or if it refuses the messages.
        """
        if self.chat is None:
            raise BadRequest(f"'{self.model}' has no chat template: it only continues texts, as `swarm generate` does")
        return self._ids(self.chat.render(messages), special=False)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=special).ids)
        except (TypeError, UnicodeError):  # half of a surrogate pair, as JSON may bring it
            raise BadRequest("the text contains lone surrogates, which are no characters: send valid Unicode") from None
