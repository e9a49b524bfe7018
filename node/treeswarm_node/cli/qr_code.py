"""Draw a join code as a QR code in the terminal, for people in the same room."""

from rich.text import Text

from treeswarm.errors import BadRequest
from treeswarm.extras import install_command

# Upper and lower module of one character of text, true for dark: a terminal's characters are twice as high as wide.
HALVES = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
# Cameras need a margin around the code.  The standard asks for 4; on a terminal 2 are enough, as the colour differs.
BORDER = 2


def can_draw_qr() -> bool:
    """Return whether the library that makes QR codes is installed."""
    try:
        import segno  # noqa: F401, PLC0415
    except ImportError:
        return False
    return True


def check_qr() -> None:
    """Raise BadRequest, with what to install, if QR codes cannot be drawn."""
    if not can_draw_qr():
        raise BadRequest(f"--qr needs segno: {install_command('node')}, or start without --qr")


def draw_qr(code: str) -> Text:
    """Return a QR code of a join code, black on white whatever the terminal's colours are.

    It is written in capitals, which take half the room; join codes are read in either.
    """
    import segno  # noqa: PLC0415  # only when a code is drawn

    rows = [[bool(dark) for dark in row] for row in segno.make_qr(code.upper(), error="l").matrix_iter(border=BORDER)]
    if len(rows) % 2:
        rows.append([False] * len(rows[0]))
    pairs = zip(rows[::2], rows[1::2], strict=True)
    lines = ["".join(HALVES[halves] for halves in zip(*pair, strict=True)) for pair in pairs]
    return Text("\n".join(lines), style="black on white", no_wrap=True)
