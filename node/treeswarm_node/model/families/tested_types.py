"""Say what the tests of this release found of a model type, from the table that they keep.

Nothing is allowed or refused by this table: a node checks every model when it loads it.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True)
class TypeTest:
    """Says what the tests found of a model type."""

    result: str
    """`exact`, `refused`, `open` if it is neither yet, or `untested`."""
    reason: str = ""
    """Why it is refused, or empty."""


def find_type_test(model_type: str) -> TypeTest:
    """Return what the tests found of a type of transformers."""
    content = _content()
    if model_type in content["exact"]:
        return TypeTest("exact")
    for entry in content["refused"]:
        if model_type in entry["types"]:
            return TypeTest("refused", entry["reason"])
    return TypeTest("open" if model_type in content["open"] else "untested")


@cache
def _content() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text("utf-8"))
