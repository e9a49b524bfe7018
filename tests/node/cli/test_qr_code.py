"""The QR code of a join code is read back as the same code, in any letters."""

import sys

import pytest
import segno

from treeswarm.errors import BadRequest
from treeswarm.protocol.join_code import JoinCode
from treeswarm_node.cli.qr_code import BORDER, HALVES, check_qr, draw_qr

CODE = "swarm:192.168.1.7:35313/bbzn-cg6z-5r01-28hk-khn9"


def test_a_code_fits_a_small_picture_and_keeps_its_modules() -> None:
    lines = draw_qr(CODE).plain.splitlines()
    modules = {half: pair for pair, half in HALVES.items()}
    rows = [[modules[half][part] for half in line] for line in lines for part in (0, 1)]
    expected = [
        [bool(dark) for dark in row] for row in segno.make_qr(CODE.upper(), error="l").matrix_iter(border=BORDER)
    ]
    assert rows[: len(expected)] == expected
    assert (len(lines), len(lines[0])) == (17, 33)
    assert JoinCode.parse(CODE.upper()) == JoinCode.parse(CODE)


def test_a_missing_library_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segno", None)
    with pytest.raises(BadRequest, match=r"--qr needs segno: pip install .*or start without --qr"):
        check_qr()
    monkeypatch.undo()
    check_qr()
