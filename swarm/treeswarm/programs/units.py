"""Quantities as text, with the unit that suits their size: the one way in which both programs write bytes and times."""

BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
TIME_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def format_bytes(count: float) -> str:
    """Return a number of bytes with three significant digits, such as `1.95 GiB`, `340 KiB` or `12 B`."""
    for unit in BYTE_UNITS:
        # What would be rounded to 1000 or more takes four digits, up to the next unit.
        if count < 1024 or unit == BYTE_UNITS[-1]:
            break
        count /= 1024
    if unit == "B":
        return f"{count:.0f} B"
    digits = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:.{digits}f} {unit}"


def format_duration(seconds: float) -> str:
    """Return text such as `350 ms`, `47 s`, `3 min 20 s` or `5 h 12 min`."""
    if 0 < seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_rough_duration(seconds: float) -> str:
    """Return a duration in its largest unit, such as `90 s`, `1.5 h` or `2 d`: for differences between clocks."""
    for size, unit in TIME_UNITS:
        # Rounded first: a clock that is set an hour ahead differs by 3599.8 s, once the message has travelled.
        if (count := seconds / size) >= (2 if unit == "min" else 0.95):
            return f"{count:.0f} {unit}" if count >= 9.5 else f"{round(count, 1):g} {unit}"
    return f"{seconds:.0f} s"
