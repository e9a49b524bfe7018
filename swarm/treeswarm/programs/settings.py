"""Settings of the programs: a flag, else a `TREESWARM_…` variable, else the config file, else the default.

The config file is TOML with one table per program.  Its keys are the long flags without the leading dashes, with dashes
or underscores between the words, and the names of positional arguments.  The variable of `--max-sessions` is
`TREESWARM_MAX_SESSIONS`.

    [node]
    model = "demo"
    max-sessions = 32
    verbose = true

A program builds its argparse parser, adds `--config` with `add_config_flag`, and calls `parse`.
"""

import argparse
import difflib
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treeswarm.errors import BadRequest

PREFIX = "TREESWARM_"
CONFIG_VARIABLE = f"{PREFIX}CONFIG"
# Tables that a config file may have: one file can serve a machine that runs several programs.
PROGRAMS = ("node", "serve", "chat", "generate", "models", "status")
# Arguments that can be given on the command line only.
NO_SETTINGS = ("config", "dry-run", "print-completion")
WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}


def add_config_flag(parser: argparse.ArgumentParser, program: str) -> None:
    """Add `--config FILE`, which every program has."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"TOML file with a table [{program}] of these flags; {PREFIX}… variables and flags override it",
    )


def parse(
    parser: argparse.ArgumentParser, program: str, argv: Sequence[str], environ: Mapping[str, str]
) -> argparse.Namespace:
    """Parse `argv`, and take what is not in it from the variables in `environ` and from the config file.

    `program` names the table of the file, and the subcommand where `parser` has one of that name.  The parser is
    changed, so it can be used only once.  Variables that name no flag of this program are ignored, and empty ones count
    as not set.

    Raises BadRequest that names the file or variable: if the file cannot be read, for unknown keys, wrong types and
    values that the flag would not accept.
    """
    subparser = _subcommand(parser, program)
    settable = {key: action for action in subparser._actions if (key := _key(action)) is not None}
    path = _config_path(subparser, argv, environ)
    settings = from_environment(settable, environ)
    if path is not None:
        table = from_table(settable, read_table(path, program), f"{path} [{program}]")
        settings = {**_without_rivals(subparser, table, set(settings)), **settings}
    return _parse_with(parser, subparser, argv, settings)


@dataclass(frozen=True)
class Setting:
    """A value for an argument that is not on the command line."""

    dest: str
    """Name of the argument in the namespace."""
    value: Any


def from_table(settable: Mapping[str, argparse.Action], table: Mapping[str, Any], origin: str) -> dict[str, Setting]:
    """Return the settings of a config file's table by argparse's dest.

    `origin` names file and table in errors.  Raises BadRequest.
    """
    settings: dict[str, Setting] = {}
    for written, value in table.items():
        key = written.replace("_", "-")
        if key not in settable:
            raise BadRequest(f"{origin} has '{written}', which is no setting{_nearest(key, settable)}")
        action = settable[key]
        if action.dest in settings:
            raise BadRequest(f"{origin} sets '{written}' twice, in two spellings or by two flags: remove one")
        settings[action.dest] = Setting(action.dest, _checked_value(action, value, f"{origin} {written}"))
    return settings


def from_environment(settable: Mapping[str, argparse.Action], environ: Mapping[str, str]) -> dict[str, Setting]:
    """Return the settings of the environment variables by argparse's dest.  Raises BadRequest."""
    settings: dict[str, Setting] = {}
    for key, action in settable.items():
        name = variable_of(key)
        if text := environ.get(name):
            settings[action.dest] = Setting(action.dest, _checked_value(action, _typed(action, text, name), name))
    return settings


def variable_of(key: str) -> str:
    """Return the name of the variable for a key: `TREESWARM_MAX_SESSIONS` for `max-sessions`."""
    return PREFIX + key.upper().replace("-", "_")


def read_table(path: Path, program: str) -> dict[str, Any]:
    """Return the program's table of a config file, empty if the file has none.  Raises BadRequest."""
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadRequest(f"the config file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the config file {path} is no TOML: {error}") from None
    programs = dict.fromkeys((*PROGRAMS, program))
    for name, table in content.items():
        if not isinstance(table, dict):
            raise BadRequest(f"{path} has '{name}' outside of any table: write [{program}] above it")
        if name not in programs:
            raise BadRequest(f"{path} has a table [{name}], which no program reads{_nearest(name, programs)}")
    return dict(content.get(program, {}))


def _subcommand(parser: argparse.ArgumentParser, program: str) -> argparse.ArgumentParser:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and program in action.choices:
            subparser: argparse.ArgumentParser = action.choices[program]
            return subparser
    return parser


def _key(action: argparse.Action) -> str | None:
    """Return the key of an argument, or None for --help, --version, --config and subcommands."""
    if isinstance(action, argparse._SubParsersAction) or not _has_value(action):
        return None
    long = [option for option in action.option_strings if option.startswith("--")]
    if not action.option_strings:
        return action.dest.replace("_", "-")
    key = long[0].removeprefix("--") if long else action.dest
    return None if key in NO_SETTINGS else key


def _has_value(action: argparse.Action) -> bool:
    """Return whether an argument takes a value or stands for one; --help and --version do not."""
    stands_for_value = (
        isinstance(action, argparse.BooleanOptionalAction | argparse._CountAction) or action.const is not None
    )
    return action.nargs != 0 or stands_for_value


def _config_path(parser: argparse.ArgumentParser, argv: Sequence[str], environ: Mapping[str, str]) -> Path | None:
    config_parser = argparse.ArgumentParser(prog=parser.prog, add_help=False)
    config_parser.add_argument("--config")
    has_flag = any("--config" in action.option_strings for action in parser._actions)
    value = config_parser.parse_known_args(argv)[0].config if has_flag else None
    path = value or environ.get(CONFIG_VARIABLE)
    return Path(path) if path else None


def _parse_with(
    parser: argparse.ArgumentParser,
    subparser: argparse.ArgumentParser,
    argv: Sequence[str],
    settings: Mapping[str, Setting],
) -> argparse.Namespace:
    """Parse the command line, and use `settings` for the arguments that are not on it.

    Defaults of these arguments are suppressed, so that the namespace shows which of them the command line sets.
    """
    for action in subparser._actions:
        if action.dest not in settings:
            continue
        action.required = False
        if action.option_strings:
            action.default = argparse.SUPPRESS
        else:
            action.default = None
            action.nargs = "*" if _is_list(action) else "?"
        subparser._defaults.pop(action.dest, None)
    for group in subparser._mutually_exclusive_groups:
        group.required = group.required and not any(action.dest in settings for action in group._group_actions)
    args = parser.parse_args(argv)
    typed = {action.dest for action in subparser._actions if _is_typed(action, args)}
    for dest, setting in _without_rivals(subparser, settings, typed).items():
        if dest not in typed:
            setattr(args, dest, setting.value)
    for dest in settings:
        if not hasattr(args, dest):
            setattr(args, dest, None)
    return args


def _is_typed(action: argparse.Action, args: argparse.Namespace) -> bool:
    value = getattr(args, action.dest, None)
    return value not in (None, []) and value != action.default


def _without_rivals(
    parser: argparse.ArgumentParser, weaker: Mapping[str, Setting], stronger: Collection[str]
) -> dict[str, Setting]:
    """Return the settings of `weaker` that are not mutually exclusive with an argument in `stronger`.

    A user who types --peers, for example, does not want the --registry of a config file.
    """
    rivals = {
        action.dest
        for group in parser._mutually_exclusive_groups
        if any(action.dest in stronger for action in group._group_actions)
        for action in group._group_actions
    }
    return {dest: setting for dest, setting in weaker.items() if dest not in rivals}


def _is_list(action: argparse.Action) -> bool:
    many = action.nargs in ("*", "+", argparse.REMAINDER) or (isinstance(action.nargs, int) and action.nargs > 0)
    return many or isinstance(action, argparse._AppendAction | argparse._ExtendAction)


def _is_switch(action: argparse.Action) -> bool:
    return action.nargs == 0 and not isinstance(action, argparse._CountAction)


def _typed(action: argparse.Action, text: str, name: str) -> Any:
    """Convert a variable's text to the type that the value would have in TOML.  Raises BadRequest."""
    if _is_switch(action):
        if text.lower() not in WORDS:
            raise BadRequest(f"{name} is '{text}': give 1 or 0, true or false")
        return WORDS[text.lower()]
    kind: Any = int if isinstance(action, argparse._CountAction) else action.type
    items = [item.strip() for item in text.split(",") if item.strip()] if _is_list(action) else [text]
    if kind in (int, float):
        try:
            items = [kind(item) for item in items]
        except ValueError:
            raise BadRequest(f"{name} is '{text}': give {KINDS[kind]}") from None
    return items if _is_list(action) else items[0]


def _checked_value(action: argparse.Action, value: Any, origin: str) -> Any:
    """Return what the flag would make of a value.  Raises BadRequest."""
    if _is_switch(action):
        if not isinstance(value, bool):
            raise BadRequest(f"{origin} is {value!r}: give true or false")
        if isinstance(action, argparse.BooleanOptionalAction):
            return value
        return action.const if value else action.default
    if _is_list(action):
        values = [_checked_item(action, item, origin) for item in (value if isinstance(value, list) else [value])]
        if isinstance(action.nargs, int) and len(values) != action.nargs:
            raise BadRequest(f"{origin} has {len(values)} values: give {action.nargs}")
        return values
    return _checked_item(action, value, origin)


def _checked_item(action: argparse.Action, value: Any, origin: str) -> Any:
    kind: Any = int if isinstance(action, argparse._CountAction) else action.type or str
    # A custom type, such as "auto or a number", accepts numbers as they are written on a command line.
    accepted = {int: (int,), float: (int, float), str: (str,), Path: (str,)}.get(kind, (str, int, float))
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise BadRequest(f"{origin} is {value!r}: give {KINDS.get(kind, KINDS[str])}")
    try:
        item = kind(value) if kind in (int, float, Path) else kind(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise BadRequest(f"{origin} is {value!r}: {error}") from None
    if action.choices is not None and item not in action.choices:
        choices = [str(choice) for choice in action.choices]
        raise BadRequest(f"{origin} is {value!r}: give {', '.join(choices)}{_nearest(str(value), choices)}")
    return item


def _nearest(word: str, names: Mapping[str, Any] | Sequence[str]) -> str:
    """Return a suggestion for a misspelled word, or an empty string if no name is similar."""
    near = difflib.get_close_matches(word, list(names), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
