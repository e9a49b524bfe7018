"""Token ids to text, as they come."""

from dataclasses import dataclass, field

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


@dataclass(eq=False)
class TextStream:
    """Decodes one token at a time; a token that ends inside a character adds nothing until the next."""

    tokenizer: Tokenizer
    _stream: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=True))

    def add(self, token: int) -> str:
        """What `token` adds to the text."""
        return self._stream.step(self.tokenizer, token) or ""
