"""Declare each command-line flag once: on the config field that it sets."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from treeswarm.errors import BadRequest

Config = TypeVar("Config")


@dataclass(frozen=True)
class Flag:
    """The argument that sets a config field, attached to the field by `Annotated[TYPE, Flag(...)]`.

    The field's default is the default of the flag, and `help` is the description of both.
    """

    name: str
    """Name as typed, such as `--listen`; without dashes for a positional argument."""
    help: str
    metavar: str | None = None
    choices: Sequence[str] | None = None
    action: str | None = None
    """argparse's action for a switch; None for a flag that takes a value."""
    dest: str | None = None
    """Name of argparse's attribute; None: derived from `name`."""
    text_default: str | None = None
    """Default as typed, where `read` turns it into the field's default."""
    read: Callable[[str], Any] | None = None
    """Turns the typed text into the field's value and raises BadRequest if it cannot; None: argparse converts it."""

    @property
    def key(self) -> str:
        """Name of argparse's attribute."""
        return self.dest or self.name.removeprefix("--").replace("-", "_")


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Add the flags of a config class to `parser`, one argument group for each group of fields that it consists of.

    Positional arguments are left to the caller, since commands differ in whether they need them.
    """
    hints = get_type_hints(config, include_extras=True)
    group = parser.add_argument_group(_title(config))
    for field in fields(config):
        hint = hints[field.name]
        if _has_flags(hint):
            add_flags(parser, hint)
        elif (flag := _flag_of(hint)) and flag.name.startswith("--"):
            group.add_argument(flag.name, **_options(flag, field, hint))


def parse_size(text: str) -> int:
    """Return the bytes that `6GiB`, `500MB` or a plain number means.  Raises BadRequest."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMGT]?)(i?)B?", text)
    if match is None:
        raise BadRequest(f"'{text}' is not a size: give something like 6GiB or 500MB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def read_flags(config: type[Config], arguments: argparse.Namespace) -> Config:
    """Build a config from parsed arguments; fields without a flag keep their defaults.  Raises BadRequest."""
    hints = get_type_hints(config, include_extras=True)
    values: dict[str, Any] = {}
    for field in fields(config):  # type: ignore[arg-type]
        hint = hints[field.name]
        if _has_flags(hint):
            values[field.name] = read_flags(hint, arguments)
        elif flag := _flag_of(hint):
            values[field.name] = _value(flag, getattr(arguments, flag.key))
    return config(**values)


def _has_flags(hint: Any) -> bool:
    if not is_dataclass(hint):
        return False
    return any(_flag_of(inner) or _has_flags(inner) for inner in get_type_hints(hint, include_extras=True).values())


def _options(flag: Flag, field: "Field[Any]", hint: Any) -> dict[str, Any]:
    """Return what argparse's `add_argument` takes."""
    default = None if field.default is MISSING else field.default
    if flag.read is not None:
        default = flag.text_default
    options: dict[str, Any] = {"help": flag.help, "dest": flag.key, "default": default}
    if flag.action is not None:
        return {**options, "action": flag.action}
    if flag.choices is not None:
        options["choices"] = list(flag.choices)
    return {**options, "metavar": flag.metavar, "type": None if flag.read else _argparse_type(hint)}


def _argparse_type(hint: Any) -> type | None:
    """Return the type that argparse converts to; None for text."""
    annotated = get_args(hint)[0]
    plain = [kind for kind in get_args(annotated) or (annotated,) if kind is not NoneType]
    return plain[0] if plain[0] in (int, float, Path) else None


def _flag_of(hint: Any) -> Flag | None:
    return next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Flag)), None)


def _value(flag: Flag, given: Any) -> Any:
    if flag.read is None:
        return given
    return flag.read(given) if given else None


def _title(config: type) -> str:
    return (config.__doc__ or config.__name__).splitlines()[0].rstrip(".")
