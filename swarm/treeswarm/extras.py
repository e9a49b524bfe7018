"""The optional dependencies, by the extra that brings them, and the command that installs an extra here.

Nothing says where this package can be had from, except the record that pip keeps of where it came from.  So a command
is made from that record, and works: a clone, a repository, a wheel or an index.
"""

import importlib.util
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from treeswarm.errors import BadRequest

NAME, BENCH = "treeswarm", "bench"
# Modules of each extra without which nothing works that needs the extra, the best known first.
MODULES: Mapping[str, tuple[str, ...]] = {
    "node": (
        "torch",
        "transformers",
        "accelerate",
        "gguf",
        "safetensors",
        "huggingface_hub",
        "prometheus_client",
        "segno",
        "zstandard",
    ),
    "draft": ("torch", "transformers"),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "gguf": ("gguf", "transformers"),
    "tokenizers": ("transformers", "sentencepiece", "tiktoken"),
    "dht": ("hivemind",),
    "mqtt": ("aiomqtt",),
    "grammar": ("llguidance",),
    "quantization": ("bitsandbytes",),
    "plot": ("matplotlib",),
    "bench": ("treeswarm_bench",),
}  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Where this package was installed from: a clone (`folder`), an address (`url`), or else an index."""

    folder: Path | None = None
    """Folder of the clone, or None."""
    url: str | None = None
    """Address of a repository or a wheel as pip takes it, or None."""
    editable: bool = False
    """Whether the clone's files are used where they lie."""


def missing_modules(*extras: str) -> list[str]:
    """Return the modules of the extras that are not installed.  None of them is imported."""
    modules = dict.fromkeys(module for extra in extras for module in MODULES[extra])
    return [module for module in modules if importlib.util.find_spec(module) is None]


def require(extra: str, program: str) -> None:
    """Raise BadRequest, with the command to install them, if `program` needs modules that are not installed."""
    if missing := missing_modules(extra):
        names = ", ".join(missing[:-1]) + " and " + missing[-1] if missing[1:] else missing[0]
        plural = "are" if missing[1:] else "is"
        raise BadRequest(f"{program} needs {names}, which {plural} not installed: {install_command(extra)}")


def install_command(*extras: str) -> str:
    """Return the command that adds the extras to this installation."""
    return command_for(read_origin(), Path.cwd(), *extras)


def command_for(origin: Origin, cwd: Path, *extras: str) -> str:
    """Return the command that adds the extras to what was installed from `origin`.  Pure."""
    names = f"[{','.join(extras)}]"
    if extras == (BENCH,):  # a distribution of its own, which lies beside the other one
        return _bench_command(origin, cwd)
    if origin.folder is not None:
        return _pip(f"{_path_from(cwd, origin.folder)}{names}", editable=origin.editable)
    return _pip(f"{NAME}{names} @ {origin.url}" if origin.url else f"{NAME}{names}")


def _bench_command(origin: Origin, cwd: Path) -> str:
    if origin.folder is not None:
        return _pip(_path_from(cwd, origin.folder / BENCH), editable=origin.editable)
    if origin.url is None:
        return _pip(f"{NAME}[{BENCH}]")
    if origin.url.startswith("git+"):
        return _pip(f"{NAME}-{BENCH} @ {origin.url}#subdirectory={BENCH}")
    place, _, wheel = origin.url.rpartition("/")
    return _pip(f"{NAME}-{BENCH} @ {place}/{wheel.replace(NAME, f'{NAME}_{BENCH}', 1)}")


def read_origin() -> Origin:
    """Return where this package was installed from; a package that was not installed is used in its clone."""
    try:
        record = distribution(NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        return Origin(folder=Path(__file__).parents[2])
    return parse_origin(json.loads(record)) if record else Origin()


def parse_origin(record: Mapping[str, Any]) -> Origin:
    """Return the origin that pip's record `direct_url.json` names.  Pure."""
    url = str(record["url"])
    if "dir_info" in record:
        return Origin(folder=Path(unquote(urlsplit(url).path)), editable=bool(record["dir_info"].get("editable")))
    if "vcs_info" not in record:
        return Origin(url=url)
    revision = record["vcs_info"].get("requested_revision")
    return Origin(url=f"{record['vcs_info']['vcs']}+{url}" + (f"@{revision}" if revision else ""))


def _path_from(cwd: Path, path: Path) -> str:
    """Return a path as pip takes it: from the folder `cwd` where it lies in that, so that people see `.[node]`."""
    if not path.is_relative_to(cwd):
        return str(path)
    within = path.relative_to(cwd)
    return "." if within == Path() else f"./{within}"


def _pip(requirement: str, *, editable: bool = False) -> str:
    quoted = shlex.quote(requirement)
    return f"pip install {'-e ' if editable else ''}{quoted}"
