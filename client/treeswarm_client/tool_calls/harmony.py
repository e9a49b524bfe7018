"""Answers in gpt-oss's harmony format: messages in channels, of which one is thinking and one calls tools."""

import re

from treeswarm_client.tool_calls.bodies.call_reader import LONGEST_HEADER, CallReader
from treeswarm_client.tool_calls.reader import BrokenCall, Reading

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")
MARKS = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
RECIPIENT = re.compile(r"to=([\w.-]+)")
THINKING = "analysis"
# How a header begins; an empty one is a header too.
HEADERS = (START, CHANNEL, "assistant", "to=")


def read_harmony(calls: CallReader) -> Reading[None]:
    """Read all messages of an answer, which goes on after `<|start|>assistant` of the prompt.

    A text without a header is the answer itself.
    """
    while (yield from calls.text.peek()):
        calls.text.mark()
        try:
            header, _ = yield from calls.text.text_until((MESSAGE,), LONGEST_HEADER)
            if header.strip() and not header.strip().startswith(HEADERS):
                raise BrokenCall
        except BrokenCall:
            calls.text.rewind()
            yield from _read_plain(calls)
            continue
        calls.text.release()
        yield from _read_message(calls, header)


def _read_message(calls: CallReader, header: str) -> Reading[None]:
    recipient = RECIPIENT.search(header)
    channel = header.rpartition(CHANNEL)[2].split()[:1]
    calls.events.start_section()
    if recipient is not None and recipient[1].startswith("functions."):
        calls.begin(recipient[1].removeprefix("functions."))
        yield from calls.text.until((*ENDS, START), calls.events.arguments)
        calls.events.end_call()
    elif channel == [THINKING]:
        yield from calls.text.until((*ENDS, START), calls.events.reasoning)
    else:
        yield from calls.text.until((*ENDS, START), calls.events.content)
    calls.events.start_section()


def _read_plain(calls: CallReader) -> Reading[None]:
    """Read text that has no header, up to the next message; a channel's mark at its beginning begins none."""
    yield from calls.text.literal(CHANNEL)
    mark = yield from calls.text.until((*ENDS, START, CHANNEL, MESSAGE), calls.events.content)
    if mark == CHANNEL:
        calls.text.unread(mark)
