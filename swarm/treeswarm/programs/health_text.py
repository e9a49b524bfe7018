"""Findings for people and for programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from treeswarm.programs.health import Finding, Verdict, failed

COLOURS = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}


def show(console: Console, findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print them; the exit status: 1 where something fails."""
    if as_json:
        told = {"ok": not failed(findings), "findings": [asdict(finding) for finding in findings]}
        console.print_json(json.dumps(told)) if console.is_terminal else print(json.dumps(told))
    else:
        console.print(table(findings))
    return int(failed(findings))


def table(findings: Sequence[Finding]) -> Table:
    """One line a finding, and its next step below where there is one."""
    made = Table.grid(padding=(0, 2))
    made.add_column()
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for finding in findings:
        said = Text(finding.said)
        if finding.next:
            said.append(f"\n→ {finding.next}", "cyan")
        made.add_row(Text(finding.verdict.value, COLOURS[finding.verdict]), finding.check, said)
    return made
