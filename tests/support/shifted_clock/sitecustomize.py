"""Shifts the wall clock of a Python process whose PYTHONPATH names this folder.

The file that SHIFTED_CLOCK names holds the seconds to add.  It is read at every call, so a test can step the clock of a
program that runs.  Monotonic clocks are left alone, as they are when a real clock is set.
"""

import os
import time
from pathlib import Path

_file = os.environ.get("SHIFTED_CLOCK")
_real_time = time.time


def _shifted_time() -> float:
    assert _file is not None
    return _real_time() + float(Path(_file).read_text("utf-8") or 0)


if _file:
    time.time = _shifted_time
