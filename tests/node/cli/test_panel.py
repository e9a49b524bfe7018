"""What a node's owner sees on the terminal: loading progress and the live panel."""

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
from tests.support.terminal import CTRL_C
from tests.support.terminal import run_on_terminal as terminal_session

from treeswarm.model_files import resolve_model
from treeswarm.progress import CHECKING, DOWNLOADING, LOADING, PROVING
from treeswarm.protocol.records import NodeState
from treeswarm.protocol.spans import Span
from treeswarm_node.cli import panel
from treeswarm_node.cli.logs import PanelHandler, set_up_logging
from treeswarm_node.cli.panel import Throughput, render_blocks, render_panel
from treeswarm_node.cli.progress_bar import LoadingBar, LoadingLog, LoadingProgress
from treeswarm_node.cli.qr_code import draw_qr
from treeswarm_node.cli.terminal import WAITING, TerminalWriter
from treeswarm_node.engine.counters import Counters
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.monitoring.snapshot import (
    ComputeSnapshot,
    KVSnapshot,
    NetworkSnapshot,
    NodeDescription,
    NodeSnapshot,
    SessionsSnapshot,
    SpanSnapshot,
)

NOW = NodeSnapshot(
    about=NodeDescription("org/model", "abc", "cuda", "10.0.0.5:4001", blocks=8),
    hosting=SpanSnapshot(NodeState.ONLINE, Span(2, 5)),
    uptime_s=100.0,
    compute=ComputeSnapshot(Counters(rows=500, tokens=100, compute_s=5.0, queue_s=0.004), 2, 3_200_000_000),
    sessions=SessionsSnapshot(open=3, limit=256, opened=7, refusals={"full": 2}),
    kv=KVSnapshot(pages=10, free=4),
    network=NetworkSnapshot(sent={"link": 3000, "control": 1000}, peers=6),
)
BEFORE = replace(
    NOW,
    uptime_s=90.0,
    compute=ComputeSnapshot(Counters(rows=100, tokens=50, compute_s=0.0)),
    network=NetworkSnapshot(sent={"link": 1000}),
)


def with_state(state: NodeState) -> NodeSnapshot:
    return replace(NOW, hosting=replace(NOW.hosting, state=state))


def panel_text(
    snapshot: NodeSnapshot,
    throughput: Throughput,
    *events: str,
    loading: LoadingProgress | None = None,
    leaving: bool = False,
) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(render_panel(snapshot, throughput, events, loading, leaving=leaving))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_panel_shows_state_load_and_events() -> None:
    text = panel_text(NOW, Throughput.between(BEFORE, NOW), "12:00:00 session 1 opened")
    for part in (
        "org/model at 10.0.0.5:4001", "online", "1 min 40 s", "2:5 of 8", "3 of 256, 7 since start, 2 refused",
        "5 tokens/s, 40 rows/s, device busy 50%", "2 waiting, 4 ms on average", "256 of 640 rows", "2.98 GiB on cuda",
        "300 B/s sent, 0 B/s received", "6 known", "12:00:00 session 1 opened",
    ):  # fmt: skip
        assert part in text
    assert "joining  1 min 40 s  loading tensors: 3 of 9" in panel_text(
        with_state(NodeState.JOINING), Throughput(), loading=LoadingProgress(3, 9, LOADING)
    )
    assert "paused  1 min 40 s  swarm-node resume" in panel_text(with_state(NodeState.PAUSED), Throughput())
    assert "loading" not in panel_text(NOW, Throughput(), loading=LoadingProgress(9, 9, LOADING))


def test_panel_says_what_the_speculator_is_worth() -> None:
    hosting = replace(NOW.hosting, proposes="autoregressive, first guess right in 53% of cases")
    proposing = replace(NOW, hosting=hosting, compute=ComputeSnapshot(Counters(proposals=20, proposed_right=31)))
    line = "20 trees by autoregressive, first guess right in 53% of cases, 1.6 tokens right per tree"
    assert line in panel_text(proposing, Throughput())
    assert "proposes" not in panel_text(NOW, Throughput())


def test_text_written_by_a_peer_is_not_parsed_as_markup() -> None:
    assert "[red]x[/nothing]" in panel_text(NOW, Throughput(), "[red]x[/nothing]")


def test_loading_names_its_sizes_in_the_units_that_suit_them() -> None:
    assert str(LoadingProgress(340 << 10, 2 << 30, DOWNLOADING)) == "downloading: 340 KiB of 2.00 GiB"
    assert str(LoadingProgress(340 << 10, 0, DOWNLOADING)) == "downloading: 340 KiB"


def test_panel_says_how_long_sessions_still_have() -> None:
    draining = replace(NOW, hosting=replace(NOW.hosting, state=NodeState.DRAINING, grace_left_s=12.4))
    text = panel_text(draining, Throughput(), leaving=True)
    assert "draining  1 min 40 s  12 s left for 3 sessions to move to other nodes" in text
    assert "Ctrl-C again: end at once" in text
    assert "left for" not in panel_text(replace(draining, sessions=SessionsSnapshot()), Throughput(), leaving=True)
    assert "Ctrl-C: leave the swarm" in panel_text(draining, Throughput())


def test_blocks_as_text() -> None:
    assert render_blocks(NOW).plain == "··███···  2:5 of 8"
    large = replace(NOW, about=replace(NOW.about, blocks=80), hosting=replace(NOW.hosting, span=Span(0, 80)))
    assert render_blocks(large).plain == "█" * 32 + "  0:80 of 80"
    assert Throughput.between(NOW, NOW) == Throughput()


def test_loader_reports_every_tensor_it_reads() -> None:
    reports: list[tuple[int, int, str]] = []
    load_span(
        resolve_model("demo"), Span(0, 2), torch.float32, torch.device("cpu"), lambda *report: reports.append(report)
    )
    total = reports[0][1]
    assert total > 10
    assert sorted(done for done, _, _ in reports) == list(range(1, total + 1))
    assert {(of, what) for _, of, what in reports} == {(total, LOADING)}


def test_log_has_a_loading_line_every_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    loading_log = LoadingLog(lambda: now)
    with caplog.at_level(logging.INFO):
        for second in range(31):
            now = float(second)
            loading_log(second, 30, LOADING)
        loading_log(1, 30, "downloading")
        loading_log(30, 30, "downloading")
    assert caplog.messages == [f"loading tensors: {done} of 30" for done in (2, 12, 22, 30)]


def test_bar_shows_the_tests_that_follow_the_check_of_weights() -> None:
    screen = io.StringIO()
    bar = LoadingBar(Console(file=screen, width=120, force_terminal=True))
    bar(5, 5, CHECKING)
    bar(0, 0, PROVING)
    bar.stop()  # draws once more
    assert "testing and measuring the loaded blocks …" in screen.getvalue().rpartition("checking weights")[2]
    assert not LoadingProgress(0, 0, PROVING).finished
    assert LoadingProgress(1, 1, PROVING).finished


NODE = [sys.executable, "-m", "treeswarm_node.cli.main", "demo", "--blocks", "0:1", "--listen", "127.0.0.1:0"]
NODE += ["--registry", "none", "--threads", "1", "--kv-tokens", "1024"]


def test_terminal_shows_ready_lines_then_the_panel_and_on_a_key_the_code(tmp_path: Path) -> None:
    environment = {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    with terminal_session([*NODE, "--identity", str(tmp_path / "id")], environment) as terminal:
        code = re.findall(r"join code: +(\S+)\r", terminal.read_until("clients ask with: swarm generate"))[0]
        picture = terminal.read_until("c: join code   Ctrl-C: leave the swarm").rpartition("╭")[2]
        assert "online" in picture
        assert "0:1 of 8" in picture
        terminal.press(b"c")
        shown = terminal.read_until("c: back   Ctrl-C: leave the swarm")
        assert code in shown
        for line in draw_qr(code).plain.splitlines():
            assert line in shown
        terminal.press(b"xC")
        assert "0:1 of 8" in terminal.read_until("c: join code")
        while_shown = terminal.echoes()
        terminal.press(CTRL_C)
        assert terminal.wait_for_exit() == 0
        assert (while_shown, terminal.echoes()) == (False, True)


def test_no_panel_flag_prints_lines_run_on_terminal(tmp_path: Path) -> None:
    written = run_on_terminal([*NODE, "--no-panel", "--identity", str(tmp_path / "id")], until="clients ask with")
    assert "╭" not in written


def run_on_terminal(command: list[str], until: str) -> str:
    """Run a program on a terminal, stop it by Ctrl-C once it has written `until`, and return all that it wrote.

    Its exit status must be 0.
    """
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as process:
        os.close(theirs)
        written, interrupted, deadline = b"", False, time.monotonic() + 120
        try:
            while time.monotonic() < deadline:
                if not select.select([ours], [], [], 1.0)[0]:
                    continue
                try:
                    chunk = os.read(ours, 1 << 16)
                except OSError:  # Linux raises it once no process has the terminal open
                    break
                if not chunk:
                    break
                written += chunk
                if not interrupted and until.encode() in written:
                    interrupted = True
                    process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0, written.decode()
        finally:
            process.kill()
            os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    assert until in text
    assert "Traceback" not in text
    return text


class StuckTerminal(io.StringIO):
    """A terminal that does not read, as after Ctrl-S, until `reads` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.written_to = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.written_to.set()
        self.reads.wait()
        return super().write(text)


async def test_terminal_that_does_not_read_blocks_no_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel, "REDRAW_S", 0.001)
    terminal, reads = StuckTerminal(), 0
    live_panel = panel.LivePanel(Console(file=terminal, width=100, force_terminal=True))

    async def read() -> NodeSnapshot:
        nonlocal reads
        reads += 1
        return NOW

    try:
        async with live_panel.watching(read), asyncio.timeout(60):
            while reads < 100:
                record = logging.makeLogRecord({"levelno": logging.WARNING, "msg": f"read {reads}"})
                live_panel.add_event(record, "a warning")
                await asyncio.sleep(0.001)
        assert terminal.written_to.is_set()
        assert not live_panel.terminal.close(within_s=0.01)
    finally:
        terminal.reads.set()
    assert live_panel.terminal.close(within_s=60)
    assert terminal.getvalue().count("a warning") <= WAITING


def test_terminal_that_is_gone_ends_the_drawing_only() -> None:
    writer, calls = TerminalWriter(), list[int]()

    def gone() -> None:
        raise OSError(5, "Input/output error")

    for call in (lambda: calls.append(1), gone, lambda: calls.append(2)):
        writer.put(call)
    assert writer.close(within_s=60)
    writer.put(gone)
    assert calls == [1]


def test_log_line_that_cannot_be_shown_raises_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    live_panel = panel.LivePanel(Console(file=io.StringIO()))
    PanelHandler(live_panel).handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    assert live_panel.terminal.close(within_s=60)
    assert "TypeError" in capsys.readouterr().err


def test_node_whose_terminal_does_not_read_serves_and_stops(tmp_path: Path) -> None:
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
            while select.select([], [theirs], [], 0)[1]:  # until unread output has filled the terminal
                assert time.monotonic() < deadline
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            time.sleep(3)  # several pictures later
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                assert 'treeswarm_node_state{state="online"} 1.0' in str(answer.read(), "utf-8")
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(ours)
            os.close(theirs)


def test_log_goes_to_a_file_beside_the_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    handler_lists = list[list[logging.Handler]]()
    monkeypatch.setattr(logging, "basicConfig", lambda *, handlers, **_: handler_lists.append(handlers))
    live_panel = panel.LivePanel(Console(file=io.StringIO()))
    for stderr in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stderr)
        set_up_logging(json_lines=False, verbose=False, panel=live_panel)
    assert live_panel.terminal.close(within_s=60)
    assert [[type(handler) for handler in handlers] for handlers in handler_lists] == [
        [PanelHandler],
        [PanelHandler, logging.StreamHandler],
    ]


def test_json_log_format_prints_only_json_lines(tmp_path: Path) -> None:
    command = [*NODE, "--log-format", "json", "--verbose", "--identity", str(tmp_path / "id")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        process.terminate()
        rest, errors = process.communicate(timeout=60)
    assert json.loads(ready)["event"] == "ready"
    assert rest == ""
    assert all(json.loads(line)["message"] for line in errors.splitlines())
