"""What a node's owner sees: how far loading is, and the live picture."""

import asyncio
import io
import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.support.registry_media import free_port

from treeswarm.model_files import resolve_model
from treeswarm.progress import LOADING
from treeswarm.protocol.records import NodeState
from treeswarm.protocol.spans import Span
from treeswarm_node.cli import panel
from treeswarm_node.cli.main import _set_up_logging, _ToPanel
from treeswarm_node.cli.panel import Throughput, blocks, duration, picture, size
from treeswarm_node.cli.progress_bar import Loading, LoadingLog
from treeswarm_node.cli.terminal import WAITING, TerminalWriter
from treeswarm_node.engine.counters import Counters
from treeswarm_node.model.loader import load_span
from treeswarm_node.monitoring.snapshot import KVSnapshot, NodeSnapshot

NOW = NodeSnapshot(
    model="org/model", node="abc", device="cuda", address="10.0.0.5:4001", state=NodeState.ONLINE, uptime_s=100.0,
    blocks=8, span=Span(2, 5), memory_bytes=3_200_000_000, sessions=3, most_sessions=256, opened=7,
    refusals={"full": 2}, counters=Counters(rows=500, tokens=100, compute_s=5.0, queue_s=0.004),
    kv=KVSnapshot(pages=10, free=4), sent={"link": 3000, "control": 1000}, peers=6, queue=2,
)  # fmt: skip
BEFORE = replace(NOW, uptime_s=90.0, counters=Counters(rows=100, tokens=50, compute_s=0.0), sent={"link": 1000})


def text_of(now: NodeSnapshot, pace: Throughput, *events: str, loading: Loading | None = None) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(picture(now, pace, events, loading))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_picture_says_what_the_owner_wants_to_know() -> None:
    seen = text_of(NOW, Throughput.between(BEFORE, NOW), "12:00:00 session 1 opened")
    for part in (
        "org/model at 10.0.0.5:4001", "online", "1 min 40 s", "2:5 of 8", "3 of 256, 7 since start, 2 refused",
        "5 tokens/s, 40 rows/s, device busy 50%", "2 waiting, 4 ms", "256 of 640 rows", "3.2 GB on cuda",
        "300 B/s out, 0 B/s in", "6 known", "12:00:00 session 1 opened",
    ):  # fmt: skip
        assert part in seen
    moving = replace(NOW, state=NodeState.JOINING)
    assert "joining  1 min 40 s  loading tensors: 3 of 9" in text_of(
        moving, Throughput(), loading=Loading(3, 9, LOADING)
    )
    assert "paused  1 min 40 s  swarm-node resume" in text_of(replace(NOW, state=NodeState.PAUSED), Throughput())
    assert "loading" not in text_of(NOW, Throughput(), loading=Loading(9, 9, LOADING))


def test_what_a_peer_wrote_is_not_taken_for_markup() -> None:
    assert "[red]x[/nothing]" in text_of(NOW, Throughput(), "[red]x[/nothing]")


def test_small_words() -> None:
    assert [duration(s) for s in (7.9, 200, 18_720)] == ["7 s", "3 min 20 s", "5 h 12 min"]
    assert [size(n) for n in (12, 12_345, 3.2e9, 5e15)] == ["12 B", "12.3 kB", "3.2 GB", "5000.0 TB"]
    assert blocks(NOW).plain == "··███···  2:5 of 8"
    assert blocks(replace(NOW, span=Span(0, 80), blocks=80)).plain == "█" * 32 + "  0:80 of 80"
    assert Throughput.between(NOW, NOW) == Throughput()


def test_a_loader_tells_of_every_tensor_it_reads() -> None:
    told: list[tuple[int, int, str]] = []
    load_span(resolve_model("demo"), Span(0, 2), torch.float32, torch.device("cpu"), lambda *how: told.append(how))
    total = told[0][1]
    assert total > 10
    assert sorted(done for done, _, _ in told) == list(range(1, total + 1))
    assert {(all_, what) for _, all_, what in told} == {(total, LOADING)}


def test_a_log_has_few_lines_of_loading(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    told = LoadingLog(lambda: now)
    with caplog.at_level(logging.INFO):
        for second in range(31):
            now = float(second)
            told(second, 30, LOADING)
        told(1, 30, "downloading")
        told(30, 30, "downloading")
    assert caplog.messages == [f"loading tensors: {done} of 30" for done in (2, 12, 22, 30)]


NODE = [sys.executable, "-m", "treeswarm_node.cli.main", "demo", "--blocks", "0:1", "--listen", "127.0.0.1:0"]
NODE += ["--registry", "none", "--threads", "1", "--kv-tokens", "1024"]


def test_on_a_terminal_a_node_shows_how_to_join_and_then_its_picture(tmp_path: Path) -> None:
    seen = on_a_terminal([*NODE, "--identity", str(tmp_path / "id")], until="Ctrl-C: leave")
    ready, picture_begins = seen.index("clients ask with: swarm generate"), seen.index("╭")
    assert ready < picture_begins
    assert "online" in seen[picture_begins:]
    assert "0:1 of 8" in seen[picture_begins:]


def test_without_the_panel_a_terminal_has_lines(tmp_path: Path) -> None:
    seen = on_a_terminal([*NODE, "--no-panel", "--identity", str(tmp_path / "id")], until="clients ask with")
    assert "╭" not in seen


def on_a_terminal(command: list[str], until: str) -> str:
    """What a program writes to one, stopped by Ctrl-C when it has written `until`, and then ending well."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as process:
        os.close(theirs)
        seen, told, deadline = b"", False, time.monotonic() + 120
        try:
            while time.monotonic() < deadline:
                if not select.select([ours], [], [], 1.0)[0]:
                    continue
                try:
                    some = os.read(ours, 1 << 16)
                except OSError:  # how Linux says that nobody has the terminal any more
                    break
                if not some:
                    break
                seen += some
                if not told and until.encode() in seen:
                    told = True
                    process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0, seen.decode()
        finally:
            process.kill()
            os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert until in text
    assert "Traceback" not in text
    return text


class Stuck(io.StringIO):
    """A terminal in which somebody has pressed Ctrl-S."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.written_to = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.written_to.set()
        self.reads.wait()
        return super().write(text)


async def test_a_terminal_that_does_not_read_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel, "REDRAW_S", 0.001)
    terminal, looks = Stuck(), 0
    shown = panel.LivePanel(Console(file=terminal, width=100, force_terminal=True))

    async def look() -> NodeSnapshot:
        nonlocal looks
        looks += 1
        return NOW

    try:
        async with shown.watching(look), asyncio.timeout(60):
            while looks < 100:
                shown.event(logging.makeLogRecord({"levelno": logging.WARNING, "msg": f"look {looks}"}), "a warning")
                await asyncio.sleep(0.001)
        assert terminal.written_to.is_set()
        assert not shown.screen.close(within_s=0.01)
    finally:
        terminal.reads.set()
    assert shown.screen.close(within_s=60)
    assert terminal.getvalue().count("a warning") <= WAITING


def test_a_terminal_that_is_gone_ends_the_drawing_and_nothing_else() -> None:
    shown, calls = TerminalWriter(), list[int]()

    def gone() -> None:
        raise OSError(5, "Input/output error")

    for call in (lambda: calls.append(1), gone, lambda: calls.append(2)):
        shown.put(call)
    assert shown.close(within_s=60)
    shown.put(gone)
    assert calls == [1]


def test_a_line_that_cannot_be_shown_is_no_error_of_whoever_logs_it(capsys: pytest.CaptureFixture[str]) -> None:
    shown = panel.LivePanel(Console(file=io.StringIO()))
    _ToPanel(shown).handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    assert shown.screen.close(within_s=60)
    assert "TypeError" in capsys.readouterr().err


def test_a_node_whose_terminal_does_not_read_answers_and_ends_when_told(tmp_path: Path) -> None:
    port = free_port()
    command = [*NODE, "--metrics", f"127.0.0.1:{port}", "--identity", str(tmp_path / "id")]
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    log = tmp_path / "log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=errors, env=environ) as process,
    ):
        try:
            deadline = time.monotonic() + 120
            while select.select([], [theirs], [], 0)[1]:  # until what nobody reads has filled it
                assert time.monotonic() < deadline
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            time.sleep(3)  # some pictures later
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                assert 'treeswarm_node_state{state="online"} 1.0' in str(answer.read(), "utf-8")
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(ours)
            os.close(theirs)


def test_beside_the_panel_a_file_has_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    set_up = list[list[logging.Handler]]()
    monkeypatch.setattr(logging, "basicConfig", lambda *, handlers, **_: set_up.append(handlers))
    shown = panel.LivePanel(Console(file=io.StringIO()))
    for stderr in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stderr)
        _set_up_logging(json_lines=False, verbose=False, panel=shown)
    assert shown.screen.close(within_s=60)
    assert [[type(handler) for handler in handlers] for handlers in set_up] == [
        [_ToPanel],
        [_ToPanel, logging.StreamHandler],
    ]


def test_for_a_program_there_are_only_json_lines(tmp_path: Path) -> None:
    command = [*NODE, "--log-format", "json", "--verbose", "--identity", str(tmp_path / "id")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        process.terminate()
        rest, errors = process.communicate(timeout=60)
    assert json.loads(ready)["event"] == "ready"
    assert rest == ""
    assert all(json.loads(line)["message"] for line in errors.splitlines())
