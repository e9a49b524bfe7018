"""Print findings as a table for a terminal, or as JSON for programs."""

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from treeswarm.programs.health import Finding, Verdict, any_failed

COLOURS = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}


def print_findings(console: Console, findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print the findings and return the exit status: 1 if one of them failed, else 0."""
    if as_json:
        report = {"ok": not any_failed(findings), "findings": [finding.as_json() for finding in findings]}
        console.print_json(json.dumps(report)) if console.is_terminal else print(json.dumps(report))
    else:
        console.print(findings_table(findings))
    return int(any_failed(findings))


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return a table with one line per finding and, where there is one, its next step below."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        message = Text(finding.message)
        if finding.next_step:
            message.append(f"\n→ {finding.next_step}", "cyan")
        table.add_row(Text(finding.verdict.value, COLOURS[finding.verdict]), finding.check, message)
    return table
