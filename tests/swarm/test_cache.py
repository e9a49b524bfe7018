"""What can be fetched again is kept in a cache: of the environment that `make` made, or of the user."""

import sys
from pathlib import Path

import pytest

from treeswarm.model_sources.cache import cache_folder


def test_an_environment_made_by_make_keeps_its_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder("models") == tmp_path / ".cache" / "treeswarm" / "models"
    (tmp_path / ".venv" / "cache").mkdir(parents=True)
    assert cache_folder("models") == tmp_path / ".venv" / "cache" / "treeswarm" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "named"))
    assert cache_folder("models") == tmp_path / "named" / "treeswarm" / "models"
