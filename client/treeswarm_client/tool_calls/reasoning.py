"""What a model thinks before it answers, told from the answer by the marks around it."""

from dataclasses import dataclass

from treeswarm_client.tool_calls.bodies.call_reader import CallReader
from treeswarm_client.tool_calls.reader import Reading


@dataclass(frozen=True)
class ReasoningFormat:
    """The marks that one family of models puts around its thinking."""

    name: str
    opener: str
    closer: str
    anywhere: bool = False
    """Whether thinking may begin after other text; elsewhere the same mark there is text."""

    @property
    def marks(self) -> tuple[str, ...]:
        """All texts of the format; special tokens that are part of one must stay in the text."""
        return (self.opener, self.closer)

    def ends(self, prompt: str) -> bool:
        """Return whether a prompt ends with the mark that begins thinking, as many templates write it."""
        return prompt.rstrip().endswith(self.opener.rstrip())

    def is_open_in(self, answer: str) -> bool:
        """Return whether an answer that is to go on ends within thinking."""
        return answer.rfind(self.opener) > answer.rfind(self.closer)

    def read_first(self, calls: CallReader, *, is_open: bool) -> Reading[None]:
        """Read thinking at the beginning of an answer, if there is any."""
        calls.text.mark()
        yield from calls.text.spaces()
        if is_open or (yield from calls.text.literal(self.opener)):
            calls.text.release()
            yield from self.read(calls)
        else:
            calls.text.rewind()

    def read(self, calls: CallReader) -> Reading[None]:
        """Read thinking after its opener."""
        calls.events.start_section()
        yield from calls.text.until((self.closer,), calls.events.reasoning)
        calls.events.start_section()
