"""Every causal-LM type of the installed transformers is exact, or refused with the reason that the table gives."""

import random
import subprocess
import warnings
from pathlib import Path

import pytest

from tests.families.table import PAGE, Table, describe, read_table
from tests.families.verdict import judge

TABLE = read_table()
# Number of types that a run covers besides those that every run covers.
ROTATING = 6


def sample_cases(table: Table) -> list[str]:
    """Return the types of a quick run: those that every run covers, and others that depend on the commit."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    others = sorted(set(table.cases) - set(table.always))
    return [*table.always, *random.Random(commit).sample(others, ROTATING)]


def assert_as_in_table(case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, from the checkpoints' making
        fault = TABLE.find_fault(case, judge(case))
    assert fault is None, fault


@pytest.mark.parametrize("case", sample_cases(TABLE))
def test_type_is_exact_or_refused_as_the_table_says(case: str) -> None:
    assert_as_in_table(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(set(TABLE.cases) - set(sample_cases(TABLE))))
def test_other_type_is_exact_or_refused_as_the_table_says(case: str) -> None:
    assert_as_in_table(case)


def test_every_type_of_transformers_is_in_the_table() -> None:
    listed = {*TABLE.exact, *TABLE.open, *(name for names in TABLE.refused.values() for name in names)}
    assert set(TABLE.cases) == listed, "run `python -m tests.families --update`"


def test_docs_show_the_table() -> None:
    assert describe(TABLE) in PAGE.read_text("utf-8"), "run `python -m tests.families --update`"
