"""Bytes and times as people read them."""

import pytest

from treeswarm.programs.units import format_bytes, format_duration


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (12, "12 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (12_345, "12.1 KiB"), (2_000_000, "1.91 MiB"),
        (10_480_000, "9.99 MiB"), (10_485_000, "10.0 MiB"), (104_850_000, "100 MiB"), (2**30 - 1, "1024 MiB"),
        (24 * 2**30, "24.0 GiB"), (5e15, "4547 TiB"),
    ],
)  # fmt: skip
def test_bytes_have_three_digits_and_the_unit_of_their_size(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (0.135, "135 ms"), (7.9, "7 s"), (200, "3 min 20 s"), (18_720, "5 h 12 min")]
)
def test_durations_have_the_units_of_their_size(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
