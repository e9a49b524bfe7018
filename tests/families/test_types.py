"""Every type of the installed transformers that writes text is exact, or refused with the reason that a table gives."""

import random
import subprocess
import warnings
from pathlib import Path

import pytest

from tests.families.table import PAGE, SWEEPS, TEXT_SWEEP, WRAPPER_SWEEP, Table, describe, read_table
from tests.families.verdict import judge

TABLES = {sweep.section: read_table(sweep) for sweep in SWEEPS}
# Number of types of each table that a run covers besides those that every run covers.
ROTATING = {TEXT_SWEEP.section: 6, WRAPPER_SWEEP.section: 2}


def sample_cases(table: Table) -> list[str]:
    """Return the types of a quick run: those that every run covers, and others that depend on the commit."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    others = sorted(set(table.cases) - set(table.always))
    return [*table.always, *random.Random(commit).sample(others, ROTATING[table.sweep.section])]


QUICK = [(section, case) for section, table in TABLES.items() for case in sample_cases(table)]
SLOW = [(section, case) for section, table in TABLES.items() for case in sorted(table.cases)]


def assert_as_in_table(section: str, case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, from the checkpoints' making
        fault = TABLES[section].find_fault(case, judge(case))
    assert fault is None, fault


@pytest.mark.parametrize(("section", "case"), QUICK)
def test_type_is_exact_or_refused_as_the_table_says(section: str, case: str) -> None:
    assert_as_in_table(section, case)


@pytest.mark.slow
@pytest.mark.parametrize(("section", "case"), sorted(set(SLOW) - set(QUICK)))
def test_other_type_is_exact_or_refused_as_the_table_says(section: str, case: str) -> None:
    assert_as_in_table(section, case)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_type_of_transformers_is_in_the_table(table: Table) -> None:
    listed = {*table.exact, *table.open, *(name for names in table.refused.values() for name in names)}
    assert set(table.cases) == listed, "run `python -m tests.families --update`"


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_docs_show_the_table(table: Table) -> None:
    assert describe(table) in PAGE.read_text("utf-8"), "run `python -m tests.families --update`"
