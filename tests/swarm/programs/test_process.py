"""What the programs write names nodes as their owners describe them, and controls no terminal."""

import logging

from treeswarm.programs.process import PrintableFormatter, printable


def test_messages_that_quote_others_control_no_terminal() -> None:
    evil = "1 of another model (\x1b]0;title\x07\x1b[2Jdemo\u202e\r)"
    assert printable(evil) == "1 of another model (�]0;title��[2Jdemo��)"
    assert printable("Größe 模型 → ok\n\tnext") == "Größe 模型 → ok\n\tnext"


def test_log_lines_that_quote_others_control_no_terminal() -> None:
    record = logging.LogRecord("treeswarm", logging.WARNING, __file__, 1, "silent: %s", ("\x1b[31mhost:1",), None)
    assert PrintableFormatter("%(levelname)s %(message)s").format(record) == "WARNING silent: �[31mhost:1"
