"""One parameter of a request, and how the parameters of an object are read.  Pure."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from treeswarm_client.gateway.generation_request import InvalidParameter, Unsupported
from treeswarm_client.gateway.parameters.checks import AnyObject, Check, quote, same


class Api(Enum):
    """The routes for texts, by the name that the documentation has for them."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    MESSAGES = "messages"


EVERY_API = tuple(Api)


@dataclass(frozen=True)
class Parameter:
    """What one parameter may be, and what it does.

    It is honoured if it has a check.  Without one it is not: it is accepted at its neutral values, and otherwise
    refused by name.  None always stands for a parameter that is not given.
    """

    name: str
    apis: tuple[Api, ...]
    """The routes that know it."""
    meaning: str
    """What it does; or, for one that is not honoured, what to do instead or why its values have no effect."""
    check: Check | None = None
    """The check of its value, or None if it is not honoured."""
    neutral: tuple[Any, ...] | None = ()
    """Values without effect, where there is no check; None stands for all values."""
    required: bool = False

    def read(self, path: str, value: Any) -> Any:
        """Return the checked value.  Raises InvalidParameter and Unsupported."""
        if self.check is not None:
            return self.check(path, value)
        if self.neutral is None or any(same(value, neutral) for neutral in self.neutral):
            return None
        allowed = f"leave it out, or give {' or '.join(map(quote, self.neutral))}" if self.neutral else "leave it out"
        raise Unsupported(path, f"{path} is {quote(value)}, which cannot be honoured: {allowed} ({self.meaning})")


def read_parameters(body: Mapping[str, Any], table: Sequence[Parameter], path: str = "") -> dict[str, Any]:
    """Return the honoured parameters of an object that were given, checked, by name.

    `path` is the name of the object, or empty for the request.  Raises InvalidParameter and Unsupported.
    """
    known = {parameter.name: parameter for parameter in table}
    prefix = f"{path}." if path else ""
    values: dict[str, Any] = {}
    for name, value in body.items():
        if value is None:
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            raise Unsupported(f"{prefix}{name}", f"the parameter {prefix}{quote(name)[1:-1]} is not known here: {hint}")
        checked = known[name].read(f"{prefix}{name}", value)
        if known[name].check is not None:
            values[name] = checked
    for name, parameter in known.items():
        if parameter.required and name not in values:
            raise InvalidParameter(f"{prefix}{name}", f"{prefix}{name} is missing: {parameter.meaning}")
    return values


@dataclass(frozen=True)
class Fields:
    """An object with fields that a table of their own describes."""

    table: tuple[Parameter, ...]

    def __call__(self, name: str, value: Any) -> dict[str, Any]:
        return read_parameters(AnyObject()(name, value), self.table, name)

    @property
    def schema(self) -> dict[str, Any]:
        return schema_of(self.table)


def schema_of(table: Sequence[Parameter]) -> dict[str, Any]:
    """Return the JSON schema of an object: of the parameters that are honoured."""
    honoured = [parameter for parameter in table if parameter.check is not None]
    properties = {one.name: {**one.check.schema, "description": one.meaning} for one in honoured if one.check}
    required = [one.name for one in honoured if one.required]
    return {"type": "object", "properties": properties} | ({"required": required} if required else {})
