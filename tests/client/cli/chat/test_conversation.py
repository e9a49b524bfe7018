"""Typed lines become messages and commands, and messages become a conversation."""

from hypothesis import given
from hypothesis import strategies as st

from treeswarm_client.cli.chat.conversation import Conversation, Entry, PartialEntry, Turn, unknown_command

LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)


def parse_lines(*lines: str) -> tuple[list[Entry], PartialEntry]:
    """Return the entries of the lines, and what is incomplete at their end."""
    entries, unfinished = [], PartialEntry()
    for line in lines:
        entry = unfinished.add(line)
        unfinished = entry if isinstance(entry, PartialEntry) else PartialEntry()
        if isinstance(entry, Entry):
            entries.append(entry)
    return entries, unfinished


def test_line_is_a_message_or_with_a_slash_a_command() -> None:
    entries, rest = parse_lines("hello ", "/save  a b.json ", "/quit", "//etc/passwd", "")
    assert entries == [
        Entry("hello "),
        Entry("a b.json", "/save"),
        Entry("", "/quit"),
        Entry("/etc/passwd"),
        Entry(""),
    ]
    assert not rest.begun


def test_backslash_continues_on_the_next_line() -> None:
    entries, rest = parse_lines("one\\", "/two\\", "three", "four\\")
    assert entries == [Entry("one\n/two\nthree")]
    assert rest.begun
    assert rest.finish() == Entry("four")


def test_triple_quotes_take_lines_as_they_are() -> None:
    assert parse_lines('"""', "/new", "back\\", '"""')[0] == [Entry("/new\nback\\")]
    assert parse_lines('  """first', "", 'last"""  ')[0] == [Entry("first\n\nlast")]
    assert parse_lines('"""one line"""')[0] == [Entry("one line")]
    assert parse_lines('""""""')[0] == [Entry("")]
    assert parse_lines('"""')[1].begun
    assert parse_lines('"""')[1].finish() is None


@given(st.lists(LINES.filter(lambda line: '"""' not in line and not line.rstrip().endswith('"')), min_size=1))
def test_quoted_block_keeps_what_was_typed(lines: list[str]) -> None:
    entries, rest = parse_lines('"""', *lines, '"""')
    text = "\n".join(lines)
    assert [entry.command for entry in entries] == [""]
    assert entries[0].text.lstrip("\n") == text.lstrip("\n")
    assert not rest.begun


@given(st.lists(LINES))
def test_any_lines_are_parsed_without_loss(lines: list[str]) -> None:
    entries, rest = parse_lines(*lines)
    assert len(entries) <= len(lines)
    assert rest.begun or len(entries) > 0 or not lines


def test_conversation_becomes_messages() -> None:
    talk = Conversation("Be brief.").with_turn("1+1?", "2").with_turn("2+2?", "")
    assert talk.messages("3+3?") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "3+3?"},
    ]
    assert talk.without_last_turn() == Conversation("Be brief.", (Turn("1+1?", "2"),))
    assert Conversation().without_last_turn() == Conversation()
    assert Conversation().messages() == []
    assert Conversation().with_turn("a", "b").as_text() == "user: a\n\nassistant: b\n"


def test_unknown_command_error_suggests_the_nearest() -> None:
    assert "did you mean /stats?" in unknown_command("/stast")
    assert "/help lists all commands" in unknown_command("/qqqq")
