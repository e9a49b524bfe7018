"""A user at a terminal is asked once before a draft model is downloaded; nobody else is asked."""

import argparse
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from treeswarm.errors import ModelError
from treeswarm.protocol.records import NodeRecord
from treeswarm_bench.benchmarks.parts.fake_node import FakeNode
from treeswarm_client.cli.render import draft_offer
from treeswarm_client.cli.render.draft_offer import Circumstances, may_ask, offer_draft
from treeswarm_client.drafters.selection.families import FAMILIES
from treeswarm_client.drafters.selection.find_draft import FoundDraft, MissingDraft

FAMILY = FAMILIES[0]
ASKED = Circumstances(draft="auto", plain=False, at_terminal=True)
ARGS = argparse.Namespace(draft="auto", tree_size="auto", model="org/large", revision=None, json=False)


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was asked of the hub, where the draft is missing and a terminal is there."""
    asked: list[dict[str, Any]] = []

    def resolve(name: str, **options: Any) -> Path:
        asked.append({"name": name, "weights": options.get("weights", False)})
        return tmp_path

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(draft_offer, "_circumstances", lambda _: ASKED)
    monkeypatch.setattr(draft_offer, "_is_offline", lambda: False)
    monkeypatch.setattr(draft_offer, "fetch_model", lambda _: tmp_path)
    monkeypatch.setattr(draft_offer, "find_draft", lambda *_: MissingDraft("it is not here", FAMILY))
    monkeypatch.setattr(draft_offer, "share_vocabulary", lambda *_: True)
    monkeypatch.setattr(draft_offer, "_tail_proposes", lambda *_: False)
    monkeypatch.setattr(draft_offer, "resolve_model", resolve)
    return asked


def answer(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_the_question_needs_a_terminal() -> None:
    assert may_ask(ASKED)
    for change in ({"draft": "ngram"}, {"plain": True}, {"at_terminal": False}):
        assert not may_ask(replace(ASKED, **change))  # type: ignore[arg-type]


def test_a_yes_downloads_the_weights_after_the_tokenizer(
    downloads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(monkeypatch, "maybe\ny\n")
    offer_draft(ARGS)
    assert downloads == [{"name": FAMILY.draft, "weights": False}, {"name": FAMILY.draft, "weights": True}]
    question = f"Download {FAMILY.draft} ({FAMILY.gigabytes:.1f} GB) once? [Y/n]"
    assert capsys.readouterr().err.count(question) == 2, "an answer that is neither yes nor no is asked again"


@pytest.mark.parametrize("text", ["n\n", ""])
def test_a_no_is_remembered(
    text: str, downloads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(monkeypatch, text)
    offer_draft(ARGS)
    assert "Download" in capsys.readouterr().err
    answer(monkeypatch, "y\n")
    offer_draft(ARGS)
    assert (capsys.readouterr().err, downloads) == ("", [])


def test_a_failed_download_does_not_stop_the_command(
    downloads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str, **_: Any) -> Path:
        raise ModelError(f"'{name}' is gated on the hub")

    answer(monkeypatch, "\n")
    monkeypatch.setattr(draft_offer, "resolve_model", fail)
    offer_draft(ARGS)
    assert f"'{FAMILY.draft}' is gated on the hub; going on without it" in capsys.readouterr().err
    assert not downloads


def test_weights_of_another_tokenizer_are_not_fetched(
    downloads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(monkeypatch, "y\n")
    monkeypatch.setattr(draft_offer, "share_vocabulary", lambda *_: False)
    offer_draft(ARGS)
    assert [request["weights"] for request in downloads] == [False]
    assert "differs from that of org/large" in capsys.readouterr().err


def test_nothing_is_asked_where_the_hub_must_not_be(
    downloads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(draft_offer, "_is_offline", lambda: True)
    offer_draft(ARGS)
    assert (capsys.readouterr().err, downloads) == ("", [])


def test_nothing_is_asked_where_a_draft_is_there(
    downloads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for found in (FoundDraft("org/small", tmp_path), MissingDraft("there is none")):
        monkeypatch.setattr(draft_offer, "find_draft", lambda *_, found=found: found)
        offer_draft(ARGS)
    assert (capsys.readouterr().err, downloads) == ("", [])


def test_nothing_is_asked_where_the_tail_proposes(
    downloads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(draft_offer, "_tail_proposes", lambda *_: True)
    offer_draft(ARGS)
    assert (capsys.readouterr().err, downloads) == ("", [])


@pytest.mark.parametrize(
    ("tails", "proposes"), [([], False), ([("", 0.0)], False), ([("a", 0.0)], True), ([("a", 0.2), ("a", 0.6)], True)]
)
def test_a_weak_tail_needs_a_draft(
    tails: list[tuple[str, float]], proposes: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def records(*_: object) -> list[NodeRecord]:
        plain = FakeNode().record().record
        return [replace(plain, speculator=kind, agreement=agreement) for kind, agreement in tails]

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(draft_offer, "first_records", records)
    assert draft_offer._tail_proposes(ARGS, tmp_path) is proposes
