"""Read and write the table that says which types are exact, and why the others are refused."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.families.configs import FORMS
from tests.families.verdict import Verdict
from tests.families.wrapper_configs import WRAPPER_FORMS, wrapper_types
from treeswarm_node.model.families.tested_types import TYPES, WRAPPERS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEADER = """\
# Which {what} nodes compute exactly, and what they say of the others.
# `python -m tests.families --update` writes this file and the section of docs/models.md that is made from it.
"""


@dataclass(frozen=True)
class Sweep:
    """Names a set of types that is tested as a whole."""

    file: Path
    """Data file with the table."""
    section: str
    """Name of the section of the docs that is made from the table."""
    what: str
    """What the types are, in words."""
    counted: str
    """What the types are, in words for the docs."""
    types: list[str]
    """All types of the installed transformers that may belong to the set."""
    forms: list[str]


TEXT_SWEEP = Sweep(
    TYPES, "types", "causal-LM types of transformers", "decoder-only types",
    sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), list(FORMS),
)  # fmt: skip
WRAPPER_SWEEP = Sweep(
    WRAPPERS, "wrappers", "multimodal types of transformers, for text,", "multimodal types", wrapper_types(),
    list(WRAPPER_FORMS),
)  # fmt: skip
SWEEPS = (TEXT_SWEEP, WRAPPER_SWEEP)


@dataclass(frozen=True)
class Table:
    """Holds what is expected of every type and form of a sweep."""

    sweep: Sweep
    left_out: dict[str, list[str]]
    """Types that are no decoder-only language models, by what they are."""
    always: list[str]
    """Types that every run of the quick tests covers."""
    open: list[str]
    """Types that are neither exact nor refused yet."""
    exact: list[str]
    refused: dict[str, list[str]]
    """Refused types, by a part of the message that users see."""
    reasons: dict[str, str]
    """The same reasons in the words of the docs."""

    @property
    def types(self) -> list[str]:
        """All types of the installed transformers that are tested."""
        left_out = {name for names in self.left_out.values() for name in names}
        return [name for name in self.sweep.types if name not in left_out]

    @property
    def cases(self) -> list[str]:
        """All types and forms."""
        return [*self.types, *self.sweep.forms]

    def find_fault(self, case: str, verdict: Verdict) -> str | None:
        """Return how a verdict differs from the table, or None."""
        if case in self.open:
            return None
        reasons = [reason for reason, cases in self.refused.items() if case in cases]
        if case not in self.exact and not reasons:
            return (
                f"{case} is not in {self.sweep.file.name}: run `python -m tests.families --update`; now it is {verdict}"
            )
        expected = f"refused because '{reasons[0]}'" if reasons else "exact"
        agrees = verdict.result == "refused" and reasons[0] in verdict.detail if reasons else verdict.result == "exact"
        return None if agrees else f"{case} should be {expected}, and is {verdict}"


def read_table(sweep: Sweep = TEXT_SWEEP) -> Table:
    """Read the data file."""
    content = tomllib.loads(sweep.file.read_text("utf-8"))
    refused = {entry["says"]: list(entry["types"]) for entry in content["refused"]}
    reasons = {entry["says"]: str(entry["reason"]) for entry in content["refused"]}
    return Table(sweep, content["left_out"], content["always"], content["open"], content["exact"], refused, reasons)


def update_table(table: Table, verdicts: Mapping[str, Verdict]) -> tuple[Table, list[str]]:
    """Return the table with what was seen, and the cases that fit no row of it.

    A refusal fits if its message contains one of the table's reasons.
    """
    exact = {case for case in table.exact if case not in verdicts}
    refused = {reason: {c for c in cases if c not in verdicts} for reason, cases in table.refused.items()}
    misfits = []
    for case, verdict in verdicts.items():
        reason = next((reason for reason in refused if reason in verdict.detail), None)
        if verdict.result == "exact":
            exact.add(case)
        elif verdict.result == "refused" and reason is not None:
            refused[reason].add(case)
        else:
            misfits.append(f"{case} is {verdict}")
    unsettled = {misfit.split()[0] for misfit in misfits}
    return replace(
        table,
        open=sorted(unsettled | {case for case in table.open if case not in verdicts}),
        exact=sorted(exact),
        refused={reason: sorted(cases) for reason, cases in refused.items()},
    ), misfits


def write_table(table: Table) -> None:
    """Write the data file, and the section of the docs that is made from it."""
    parts = [HEADER.format(what=table.sweep.what), f"always = {_list(table.always)}\n", f"open = {_list(table.open)}\n"]
    parts += [f"exact = {_list(table.exact)}\n", "[left_out]"]
    parts += [f"{json.dumps(kind)} = {_list(types)}" for kind, types in table.left_out.items()]
    for says, types in table.refused.items():
        parts.append(f"\n[[refused]]\nsays = {json.dumps(says)}\nreason = {json.dumps(table.reasons[says])}")
        parts.append(f"types = {_list(types)}")
    table.sweep.file.write_text("\n".join(parts) + "\n", "utf-8")
    begin, end = (f"<!-- {table.sweep.section}: {edge} -->" for edge in ("begin", "end"))
    before, _, rest = PAGE.read_text("utf-8").partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}\n{describe(table)}{end}{after}", "utf-8")


def describe(table: Table) -> str:
    """Return the section of the docs."""
    exact = [case for case in table.exact if "@" not in case]
    lines = [
        f"**{len(exact)} of {len(table.types)} {table.sweep.counted} are exact**, the others are refused with their "
        f"reason{_describe_open(table.open)}.\n",
        f"Exact: {', '.join(exact)}.\n",
        "| refused because | types |",
        "|---|---|",
    ]
    by_reason: dict[str, list[str]] = {}
    for says, types in table.refused.items():
        by_reason.setdefault(table.reasons[says], []).extend(name for name in types if "@" not in name)
    for reason, types in sorted(by_reason.items(), key=lambda entry: -len(entry[1])):
        if types:
            lines.append(f"| {reason} | {len(types)}: {', '.join(sorted(types))} |")
    return "\n".join(lines) + "\n"


def _describe_open(types: list[str]) -> str:
    return f", except {len(types)} that still compute another text or fail: {', '.join(types)}" if types else ""


def _list(names: list[str]) -> str:
    """Return a TOML array in lines of at most 120 characters."""
    lines, line = ["["], "   "
    for name in sorted(names):
        if len(line) + len(name) + 4 > 120:
            lines, line = [*lines, line], "   "
        line += f' "{name}",'
    return "\n".join([*lines, *([line] if line.strip() else []), "]"]) if names else "[]"
