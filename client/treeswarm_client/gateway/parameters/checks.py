"""Checks of single values of a request.  Pure.

A check returns the value, or raises InvalidParameter, which says what to give in its place.  Types are strict: `true`
and `"0.5"` are no numbers.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from treeswarm_client.gateway.generation_request import InvalidParameter

# Number of characters of a caller's value that an error quotes.
LONGEST_QUOTE = 40


class Check(Protocol):
    """Checks one value."""

    def __call__(self, name: str, value: Any) -> Any:
        """Return the value of the parameter `name` as the gateway uses it.  Raises InvalidParameter, Unsupported."""
        ...

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of the values."""
        ...


def quote(value: Any) -> str:
    """Return a caller's value as JSON, cut to a length that fits into an error."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_QUOTE else f"{text[: LONGEST_QUOTE - 1]}…"


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; true and false are none."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def same(first: Any, second: Any) -> bool:
    """Return whether two values of JSON are the same; 1 and true are not."""
    return bool(first == second) and isinstance(first, bool) == isinstance(second, bool)


@dataclass(frozen=True)
class Number:
    """A number within bounds."""

    least: float
    most: float

    def __call__(self, name: str, value: Any) -> float:
        if not is_number(value) or not self.least <= value <= self.most:
            bounds = f"from {self.least:g} to {self.most:g}"
            raise InvalidParameter(name, f"{name} is {quote(value)}: give a number {bounds}")
        return float(value)

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "number", "minimum": self.least, "maximum": self.most}


@dataclass(frozen=True)
class Whole:
    """A whole number within bounds."""

    least: int
    most: int | None = None

    def __call__(self, name: str, value: Any) -> int:
        wrong = not is_number(value) or value != int(value)
        if wrong or value < self.least or (self.most is not None and value > self.most):
            bounds = f"from {self.least} to {self.most}" if self.most is not None else f"of at least {self.least}"
            raise InvalidParameter(name, f"{name} is {quote(value)}: give a whole number {bounds}")
        return int(value)

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.least} | ({} if self.most is None else {"maximum": self.most})


@dataclass(frozen=True)
class Seed:
    """Any whole number."""

    def __call__(self, name: str, value: Any) -> int:
        if not is_number(value) or value != int(value):
            raise InvalidParameter(name, f"{name} is {quote(value)}: give a whole number")
        return int(value)

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "integer"}


@dataclass(frozen=True)
class TrueOrFalse:
    """True or false."""

    def __call__(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise InvalidParameter(name, f"{name} is {quote(value)}: give true or false")
        return value

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Text:
    """A text, or one of some words."""

    words: tuple[str, ...] = ()
    longest: int | None = None
    """Number of characters, or None for any."""

    def __call__(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise InvalidParameter(name, f"{name} is {quote(value)}: give a text")
        if self.words and value not in self.words:
            raise InvalidParameter(name, f"{name} is {quote(value)}: give {_either(self.words)}")
        if self.longest is not None and len(value) > self.longest:
            raise InvalidParameter(name, f"{name} has {len(value)} characters: at most {self.longest} are taken")
        return value

    @property
    def schema(self) -> dict[str, Any]:
        if self.words:
            return {"type": "string", "enum": list(self.words)}
        return {"type": "string"} | ({} if self.longest is None else {"maxLength": self.longest})


@dataclass(frozen=True)
class ListOf:
    """A list whose items pass a check; a single item may stand for a list of one."""

    item: Check
    things: str
    """What the items are called, as in `at most 16 stop strings`."""
    most: int
    least: int = 0
    or_one: bool = False

    def __call__(self, name: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            if self.or_one:
                return [self.item(name, value)]
            raise InvalidParameter(name, f"{name} is {quote(value)}: give a list of {self.things}")
        if len(value) > self.most:
            raise InvalidParameter(name, f"{name} has {len(value)} {self.things}: at most {self.most} {self.things}")
        if len(value) < self.least:
            raise InvalidParameter(name, f"{name} has {len(value)} {self.things}: give at least {self.least}")
        return [self.item(f"{name}[{at}]", item) for at, item in enumerate(value)]

    @property
    def schema(self) -> dict[str, Any]:
        bounds = {"maxItems": self.most} | ({"minItems": self.least} if self.least else {})
        several = {"type": "array", "items": self.item.schema, **bounds}
        return {"anyOf": [self.item.schema, several]} if self.or_one else several


@dataclass(frozen=True)
class AnyObject:
    """An object whose content is checked elsewhere, or has no effect."""

    def __call__(self, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise InvalidParameter(name, f"{name} is {quote(value)}: give an object")
        return value

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "object"}


@dataclass(frozen=True)
class Anything:
    """Any value."""

    def __call__(self, name: str, value: Any) -> Any:
        return value

    @property
    def schema(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class ByFunction:
    """A value that a function checks, which has the schema `described`."""

    read: Callable[[str, Any], Any]
    described: Mapping[str, Any]

    def __call__(self, name: str, value: Any) -> Any:
        return self.read(name, value)

    @property
    def schema(self) -> dict[str, Any]:
        return dict(self.described)


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
