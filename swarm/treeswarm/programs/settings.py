"""Settings of the programs: a flag, else a `TREESWARM_…` variable, else the config file, else the default.

The config file is TOML with one table a program; its keys are the long flags without their dashes in front, with dashes
or underscores inside, and the names of positional arguments.  The variable of `--max-sessions` is
`TREESWARM_MAX_SESSIONS`.

    [node]
    model = "demo"
    max-sessions = 32
    verbose = true

A program builds its argparse parser, adds `--config` by `add_config_flag`, and calls `parse`.
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
# Tables that a config file may have: one file serves a machine that runs several programs.
PROGRAMS = ("node", "serve", "chat", "generate", "models", "status")
# What a program is asked to print, and where its settings are, is for the command line.
NO_SETTINGS = ("config", "print-completion")
WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}


def add_config_flag(parser: argparse.ArgumentParser, program: str) -> None:
    """`--config FILE`, as every program has it."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"TOML with a table [{program}] of these flags; {PREFIX}… variables and flags override it",
    )


def parse(
    parser: argparse.ArgumentParser, program: str, argv: Sequence[str], environ: Mapping[str, str]
) -> argparse.Namespace:
    """Like `parser.parse_args(argv)`, with what is not on the command line from `environ` and the config file.

    `program` names the table, and the subcommand where `parser` has one of that name.  The parser is changed: use it
    once.  Variables that name no flag of this program are left alone; empty ones count as not set.

    Raises BadRequest that names the file or variable, for a file that cannot be read, unknown keys, wrong types and
    values that the flag would not take.
    """
    inner = _subcommand(parser, program)
    settable = {key: action for action in inner._actions if (key := _key(action)) is not None}
    path = _config_path(inner, argv, environ)
    found = from_environment(settable, environ)
    if path is not None:
        table = from_table(settable, read_table(path, program), f"{path} [{program}]")
        found = {**_without_rivals(inner, table, set(found)), **found}
    return _filled(parser, inner, argv, found)


@dataclass(frozen=True)
class Setting:
    """A value to use where the command line has none."""

    dest: str
    value: Any


def from_table(settable: Mapping[str, argparse.Action], table: Mapping[str, Any], where: str) -> dict[str, Setting]:
    """By argparse's dest, what a config file's table says.  Raises BadRequest."""
    found: dict[str, Setting] = {}
    for written, value in table.items():
        key = written.replace("_", "-")
        if key not in settable:
            raise BadRequest(f"{where} has '{written}', which is no setting{_nearest(key, settable)}")
        action = settable[key]
        if action.dest in found:
            raise BadRequest(f"{where} sets '{written}' twice, in two spellings or by two flags: leave one away")
        found[action.dest] = Setting(action.dest, _value_of(action, value, f"{where} {written}"))
    return found


def from_environment(settable: Mapping[str, argparse.Action], environ: Mapping[str, str]) -> dict[str, Setting]:
    """By argparse's dest, what the variables say.  Raises BadRequest."""
    found: dict[str, Setting] = {}
    for key, action in settable.items():
        name = variable_of(key)
        if text := environ.get(name):
            found[action.dest] = Setting(action.dest, _value_of(action, _plain(action, text, name), name))
    return found


def variable_of(key: str) -> str:
    """`max-sessions` is set by `TREESWARM_MAX_SESSIONS`."""
    return PREFIX + key.upper().replace("-", "_")


def read_table(path: Path, program: str) -> dict[str, Any]:
    """The program's table of a config file; empty where it has none.  Raises BadRequest."""
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadRequest(f"the config file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the config file {path} is no TOML: {error}") from None
    known = dict.fromkeys((*PROGRAMS, program))
    for name, table in content.items():
        if not isinstance(table, dict):
            raise BadRequest(f"{path} has '{name}' outside of any table: write [{program}] above it")
        if name not in known:
            raise BadRequest(f"{path} has a table [{name}], which no program reads{_nearest(name, known)}")
    return dict(content.get(program, {}))


def _subcommand(parser: argparse.ArgumentParser, program: str) -> argparse.ArgumentParser:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and program in action.choices:
            found: argparse.ArgumentParser = action.choices[program]
            return found
    return parser


def _key(action: argparse.Action) -> str | None:
    """Under what name an argument can be set; None for --help, --version, --config and subcommands."""
    if isinstance(action, argparse._SubParsersAction) or not _takes_or_is_a_value(action):
        return None
    long = [option for option in action.option_strings if option.startswith("--")]
    if not action.option_strings:
        return action.dest.replace("_", "-")
    key = long[0].removeprefix("--") if long else action.dest
    return None if key in NO_SETTINGS else key


def _takes_or_is_a_value(action: argparse.Action) -> bool:
    """--help and --version take none and stand for none."""
    is_one = isinstance(action, argparse.BooleanOptionalAction | argparse._CountAction) or action.const is not None
    return action.nargs != 0 or is_one


def _config_path(parser: argparse.ArgumentParser, argv: Sequence[str], environ: Mapping[str, str]) -> Path | None:
    flags = argparse.ArgumentParser(prog=parser.prog, add_help=False)
    flags.add_argument("--config")
    has_it = any("--config" in action.option_strings for action in parser._actions)
    told = flags.parse_known_args(argv)[0].config if has_it else None
    path = told or environ.get(CONFIG_VARIABLE)
    return Path(path) if path else None


def _filled(
    parser: argparse.ArgumentParser, inner: argparse.ArgumentParser, argv: Sequence[str], found: Mapping[str, Setting]
) -> argparse.Namespace:
    """The command line, and `found` where it says nothing: left out of the namespace, what it does not say shows."""
    for action in inner._actions:
        if action.dest not in found:
            continue
        action.required = False
        if action.option_strings:
            action.default = argparse.SUPPRESS
        else:
            action.default = None
            action.nargs = "*" if _is_list(action) else "?"
        inner._defaults.pop(action.dest, None)
    for group in inner._mutually_exclusive_groups:
        group.required = group.required and not any(action.dest in found for action in group._group_actions)
    args = parser.parse_args(argv)
    typed = {action.dest for action in inner._actions if _is_typed(action, args)}
    for dest, setting in _without_rivals(inner, found, typed).items():
        if dest not in typed:
            setattr(args, dest, setting.value)
    for dest in found:
        if not hasattr(args, dest):
            setattr(args, dest, None)
    return args


def _is_typed(action: argparse.Action, args: argparse.Namespace) -> bool:
    value = getattr(args, action.dest, None)
    return value not in (None, []) and value != action.default


def _without_rivals(
    parser: argparse.ArgumentParser, weaker: Mapping[str, Setting], stronger: Collection[str]
) -> dict[str, Setting]:
    """Those of `weaker` that exclude none of `stronger`: who types --peers means no --registry of a file."""
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


def _plain(action: argparse.Action, text: str, name: str) -> Any:
    """A variable's text as TOML would have it: variables know no types.  Raises BadRequest."""
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


def _value_of(action: argparse.Action, value: Any, where: str) -> Any:
    """What the flag would make of it.  Raises BadRequest."""
    if _is_switch(action):
        if not isinstance(value, bool):
            raise BadRequest(f"{where} is {value!r}: give true or false")
        if isinstance(action, argparse.BooleanOptionalAction):
            return value
        return action.const if value else action.default
    if _is_list(action):
        values = [_item_of(action, item, where) for item in (value if isinstance(value, list) else [value])]
        if isinstance(action.nargs, int) and len(values) != action.nargs:
            raise BadRequest(f"{where} has {len(values)} values: give {action.nargs}")
        return values
    return _item_of(action, value, where)


def _item_of(action: argparse.Action, value: Any, where: str) -> Any:
    kind: Any = int if isinstance(action, argparse._CountAction) else action.type or str
    # A parser of its own, such as one of `auto` or a number, reads numbers as they are written on a command line.
    taken = {int: (int,), float: (int, float), str: (str,), Path: (str,)}.get(kind, (str, int, float))
    if isinstance(value, bool) or not isinstance(value, taken):
        raise BadRequest(f"{where} is {value!r}: give {KINDS.get(kind, KINDS[str])}")
    try:
        made = kind(value) if kind in (int, float, Path) else kind(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise BadRequest(f"{where} is {value!r}: {error}") from None
    if action.choices is not None and made not in action.choices:
        choices = [str(choice) for choice in action.choices]
        raise BadRequest(f"{where} is {value!r}: give {', '.join(choices)}{_nearest(str(value), choices)}")
    return made


def _nearest(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """A hint, or nothing where no name is like it."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
