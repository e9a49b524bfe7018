"""What is typed becomes messages and commands; messages become a conversation."""

from hypothesis import given
from hypothesis import strategies as st

from treeswarm_client.cli.chat.conversation import Conversation, Entry, PartialEntry, Turn, unknown_command

LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)


def typed(*lines: str) -> tuple[list[Entry], PartialEntry]:
    """Entries that came of the lines, and what was begun at their end."""
    entries, unfinished = [], PartialEntry()
    for line in lines:
        heard = unfinished.add(line)
        unfinished = heard if isinstance(heard, PartialEntry) else PartialEntry()
        if isinstance(heard, Entry):
            entries.append(heard)
    return entries, unfinished


def test_a_line_is_a_message_and_a_slash_makes_a_command() -> None:
    entries, rest = typed("hello ", "/save  a b.json ", "/quit", "//etc/passwd", "")
    assert entries == [
        Entry("hello "),
        Entry("a b.json", "/save"),
        Entry("", "/quit"),
        Entry("/etc/passwd"),
        Entry(""),
    ]
    assert not rest.begun


def test_a_backslash_goes_on_in_the_next_line() -> None:
    entries, rest = typed("one\\", "/two\\", "three", "four\\")
    assert entries == [Entry("one\n/two\nthree")]
    assert rest.begun
    assert rest.ended() == Entry("four")


def test_triple_quotes_take_lines_as_they_are() -> None:
    assert typed('"""', "/new", "back\\", '"""')[0] == [Entry("/new\nback\\")]
    assert typed('  """first', "", 'last"""  ')[0] == [Entry("first\n\nlast")]
    assert typed('"""one line"""')[0] == [Entry("one line")]
    assert typed('""""""')[0] == [Entry("")]
    assert typed('"""')[1].begun
    assert typed('"""')[1].ended() is None


@given(st.lists(LINES.filter(lambda line: '"""' not in line and not line.rstrip().endswith('"')), min_size=1))
def test_a_quoted_block_says_what_was_typed(lines: list[str]) -> None:
    entries, rest = typed('"""', *lines, '"""')
    said = "\n".join(lines)
    assert [entry.command for entry in entries] == [""]
    assert entries[0].text.lstrip("\n") == said.lstrip("\n")
    assert not rest.begun


@given(st.lists(LINES))
def test_no_line_is_lost_or_raises(lines: list[str]) -> None:
    entries, rest = typed(*lines)
    assert len(entries) <= len(lines)
    assert rest.begun or len(entries) > 0 or not lines


def test_a_conversation_as_messages() -> None:
    talk = Conversation("Be brief.").answered("1+1?", "2").answered("2+2?", "")
    assert talk.messages("3+3?") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "3+3?"},
    ]
    assert talk.undone() == Conversation("Be brief.", (Turn("1+1?", "2"),))
    assert Conversation().undone() == Conversation()
    assert Conversation().messages() == []
    assert Conversation().answered("a", "b").as_text() == "user: a\n\nassistant: b\n"


def test_a_command_that_is_none_is_told_the_nearest() -> None:
    assert "did you mean /stats?" in unknown_command("/stast")
    assert "/help lists all" in unknown_command("/qqqq")
