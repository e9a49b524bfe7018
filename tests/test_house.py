"""The checkout keeps the structure that `scripts/house.py` measures."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.scripts import load_script

ROOT = Path(__file__).parents[1]


@cache
def figures() -> Any:
    return load_script("house").measure(ROOT)


def listed(places: Sequence[object] | Mapping[str, object]) -> str:
    """Return the offending places, one per line."""
    lines = places.items() if isinstance(places, Mapping) else places
    return "\n".join(["", *map(str, lines)])


def test_no_folder_has_too_many_files() -> None:
    limit = load_script("house").MOST_FILES
    large = [(files, folder) for files, folder in figures().largest_folders if files > limit]
    assert not large, f"folders with more than {limit} files:{listed(large)}"


def test_no_class_name_has_two_meanings() -> None:
    names = figures().class_names_twice
    assert not names, f"class names defined in more than one file:{listed(names)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    circles = figures().import_circles
    assert not circles, f"modules that import each other:{listed(circles)}"


def test_no_docstring_starts_as_a_fragment() -> None:
    places = figures().fragment_docstrings
    assert not places, f"docstrings that start as a fragment, not as a sentence:{listed(places)}"


def test_no_file_is_too_long() -> None:
    files = figures().many_lines
    assert not files, f"files with more than {load_script('house').MOST_LINES} lines:{listed(files)}"
