"""Tests of the settings: precedence of flag, variable, file and default, and errors that name their origin."""

import argparse
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treeswarm.errors import BadRequest
from treeswarm.programs.settings import add_config_flag, parse


def count(text: str) -> int | str:
    return text if text == "auto" else int(text)


def full_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prog")
    parser.add_argument("model")
    parser.add_argument("--registry")
    parser.add_argument("--max-sessions", type=int, default=256)
    parser.add_argument("--grace", type=float, default=30.0)
    parser.add_argument("--swarm-key", type=Path)
    parser.add_argument("--tree-size", type=count, default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--key", action="append", default=[])
    parser.add_argument("--hosts", nargs="+", default=["any"])
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--no-panel", dest="panel", action="store_false")
    parser.add_argument("--color", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--version", action="version", version="1")
    add_config_flag(parser, "node")
    return parser


def read(tmp_path: Path, *argv: str, toml: str | None = None, **environ: str) -> argparse.Namespace:
    if toml is not None:
        (tmp_path / "c.toml").write_text(toml, "utf-8")
        argv = ("--config", str(tmp_path / "c.toml"), *argv)
    return parse(full_parser(), "node", argv, {f"TREESWARM_{name}": value for name, value in environ.items()})


WHOLE = """
[node]
model = "demo"
registry = "none"
max_sessions = 7
grace = 5
swarm-key = "/k"
tree-size = 64
dtype = "bfloat16"
key = ["a", "b"]
hosts = ["x", "y"]
verbose = true
no-panel = true
color = false
[serve]
whatever = 1
"""


def test_config_file_sets_every_argument(tmp_path: Path) -> None:
    args = read(tmp_path, toml=WHOLE)
    assert vars(args) | {"config": None} == {
        "model": "demo", "registry": "none", "max_sessions": 7, "grace": 5.0, "swarm_key": Path("/k"), "tree_size": 64,
        "dtype": "bfloat16", "key": ["a", "b"], "hosts": ["x", "y"], "verbose": True, "panel": False, "color": False,
        "config": None,
    }  # fmt: skip
    assert isinstance(args.grace, float)


def test_variables_set_every_argument(tmp_path: Path) -> None:
    args = read(
        tmp_path, MODEL="demo", REGISTRY="none", MAX_SESSIONS="7", GRACE="5", SWARM_KEY="/k", TREE_SIZE="64",
        DTYPE="bfloat16", KEY="a,b", HOSTS="x, y", VERBOSE="yes", NO_PANEL="1", COLOR="off",
    )  # fmt: skip
    assert vars(args) == vars(read(tmp_path, toml=WHOLE)) | {"config": None}


def test_precedence_is_flag_variable_file_default(tmp_path: Path) -> None:
    toml = '[node]\nmax-sessions = 1\ngrace = 1\nmodel = "of-file"\nkey = ["f"]\nverbose = true'
    args = read(
        tmp_path, "of-argv", "--max-sessions", "3", "--key", "x", toml=toml, MAX_SESSIONS="2", GRACE="2", KEY="e"
    )
    assert (args.model, args.max_sessions, args.grace, args.key) == ("of-argv", 3, 2.0, ["x"])
    assert args.verbose
    assert args.dtype == "float32"
    assert read(tmp_path, toml=toml).model == "of-file"
    assert not read(tmp_path, toml=toml, VERBOSE="0").verbose
    assert read(tmp_path, "--color", toml="[node]\ncolor = false", MODEL="m").color


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flag=st.none() | st.integers(0, 99), variable=st.none() | st.integers(0, 99), file=st.none() | st.integers(0, 99)
)
def test_first_given_source_determines_the_value(
    tmp_path: Path, flag: int | None, variable: int | None, file: int | None
) -> None:
    argv = ("m",) if flag is None else ("m", "--max-sessions", str(flag))
    toml = "[node]" if file is None else f"[node]\nmax-sessions = {file}"
    environ = {} if variable is None else {"MAX_SESSIONS": str(variable)}
    given_values = [value for value in (flag, variable, file, 256) if value is not None]
    assert read(tmp_path, *argv, toml=toml, **environ).max_sessions == given_values[0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1))
def test_text_is_not_altered(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, "m", toml=f"[node]\nregistry = {json.dumps(text)}").registry == text
    assert read(tmp_path, "m", REGISTRY=text).registry == text


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[node]\nmax-sesions = 1", r"c\.toml \[node\] has 'max-sesions', .* did you mean 'max-sessions'"),
        ("[node]\nconfig = 'x'", r"has 'config', which is no setting"),
        ("[node]\nversion = true", r"has 'version', which is no setting"),
        ("[nod]\nmodel = 'x'", r"a table \[nod\], .* did you mean 'node'"),
        ("model = 'x'", r"'model' outside of any table: write \[node\]"),
        ("[node]\nmax-sessions = 'many'", r"max-sessions is 'many': give a whole number"),
        ("[node]\nmax-sessions = 1.5", "max-sessions is 1.5: give a whole number"),
        ("[node]\nmax-sessions = true", "max-sessions is True: give a whole number"),
        ("[node]\ngrace = '3'", "grace is '3': give a number"),
        ("[node]\nregistry = 3", "registry is 3: give text in quotes"),
        ("[node]\nverbose = 'yes'", "verbose is 'yes': give true or false"),
        ("[node]\ndtype = 'bfloat'", "dtype is 'bfloat': give float32, bfloat16; did you mean 'bfloat16'"),
        ("[node]\ntree-size = 'big'", "tree-size is 'big': invalid literal"),
        ("[node]\nkey = ['a', 1]", "key is 1: give text in quotes"),
        ("[node]\nmax-sessions = 1\nmax_sessions = 2", "twice"),
        ("[node", "is no TOML"),
    ],
)
def test_file_errors_name_file_and_key(tmp_path: Path, toml: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        read(tmp_path, "m", toml=toml)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MAX_SESSIONS", "many", "TREESWARM_MAX_SESSIONS is 'many': give a whole number"),
        ("VERBOSE", "perhaps", "TREESWARM_VERBOSE is 'perhaps': give 1 or 0"),
        ("DTYPE", "int8", "TREESWARM_DTYPE is 'int8': give float32, bfloat16"),
        ("CONFIG", "/nowhere.toml", "/nowhere.toml cannot be read: No such file"),
    ],
)
def test_variable_errors_name_the_variable(tmp_path: Path, name: str, value: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        read(tmp_path, "m", **{name: value})


def test_foreign_and_empty_variables_are_ignored(tmp_path: Path) -> None:
    args = read(tmp_path, "m", API_KEYS="secret", MAX_SESSIONS="", MAX_SESIONS="3")
    assert args.max_sessions == 256
    assert not hasattr(args, "api_keys")


def test_missing_required_argument_is_reported_by_argparse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read(tmp_path, toml="[node]\ngrace = 1")
    assert "required: model" in capsys.readouterr().err


def test_subcommand_reads_the_table_of_its_name(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser(prog="swarm")
    commands = parser.add_subparsers(dest="command")
    serve = commands.add_parser("serve")
    serve.add_argument("--model", required=True)
    serve.add_argument("--port", type=int, default=8000)
    serve.set_defaults(run="serving")
    add_config_flag(serve, "serve")
    (tmp_path / "c.toml").write_text("[serve]\nmodel = 'demo'\nport = 1\n[node]\ngrace = 2", "utf-8")
    args = parse(parser, "serve", ["serve", "--port", "2"], {"TREESWARM_CONFIG": str(tmp_path / "c.toml")})
    assert (args.command, args.model, args.port, args.run) == ("serve", "demo", 2, "serving")


def test_required_exclusive_group_may_be_set_by_a_variable(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--here")
    group.add_argument("--there")
    assert parse(parser, "node", [], {"TREESWARM_THERE": "x"}).there == "x"


def test_typed_flag_excludes_its_rivals_in_variable_and_file(tmp_path: Path) -> None:
    def exclusive_parser() -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser()
        group = parser.add_mutually_exclusive_group()
        group.add_argument("--peers")
        group.add_argument("--registry")
        add_config_flag(parser, "node")
        return parser

    file = tmp_path / "node.toml"
    file.write_text('[node]\nregistry = "file"\n')
    config = ["--config", str(file)]
    typed = parse(exclusive_parser(), "node", ["--peers", "typed", *config], {"TREESWARM_REGISTRY": "variable"})
    assert (typed.peers, typed.registry) == ("typed", None)
    variable = parse(exclusive_parser(), "node", config, {"TREESWARM_PEERS": "variable"})
    assert (variable.peers, variable.registry) == ("variable", None)
    same = parse(exclusive_parser(), "node", ["--registry", "typed", *config], {})
    assert (same.peers, same.registry) == (None, "typed")
    assert parse(exclusive_parser(), "node", config, {}).registry == "file"
