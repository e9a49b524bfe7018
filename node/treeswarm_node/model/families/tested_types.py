"""Say what the tests of this release found of a model type, from the tables that they keep.

Nothing is allowed or refused by these tables: a node checks every model when it loads it.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TYPES = Path(__file__).with_suffix(".toml")
WRAPPERS = TYPES.with_name("tested_wrappers.toml")


@dataclass(frozen=True)
class TypeTest:
    """Says what the tests found of a model type."""

    result: str
    """`exact`, `refused`, `open` if it is neither yet, or `untested`."""
    reason: str = ""
    """Why it is refused, or empty."""


def find_type_test(model_type: str) -> TypeTest:
    """Return what the tests found of a type of transformers, which may be a multimodal wrapper."""
    for file in (TYPES, WRAPPERS):
        content = _content(file)
        if model_type in content["exact"]:
            return TypeTest("exact")
        for entry in content["refused"]:
            if model_type in entry["types"]:
                return TypeTest("refused", entry["reason"])
        if model_type in content["open"]:
            return TypeTest("open")
    return TypeTest("untested")


@cache
def _content(file: Path) -> dict[str, Any]:
    return tomllib.loads(file.read_text("utf-8"))
