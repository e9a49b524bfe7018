"""Run model types of transformers and print how they fare: `python -m tests.families [TYPE …] [--update]`."""

import argparse
import warnings
from collections import Counter

import transformers

from tests.families.table import SWEEPS, Table, read_table, update_table, write_table
from tests.families.verdict import judge


def main() -> int:
    """Print one line per type and the counts; return 1 if the tables say something else."""
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="type, or form `type@form` (default: all)")
    parser.add_argument("--update", action="store_true", help="write what is seen to the tables and to docs/models.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    faults = [fault for table in map(read_table, SWEEPS) for fault in run(table, options.types, update=options.update)]
    print("\n".join(faults))
    return 1 if faults else 0


def run(table: Table, types: list[str], *, update: bool) -> list[str]:
    """Run those types that belong to a table, or all of it, and return how what is seen differs from it."""
    cases = [case for case in types if case in table.cases] if types else table.cases
    if not cases:
        return []
    verdicts, faults = {}, []
    for case in cases:
        verdicts[case] = judge(case)
        fault = table.find_fault(case, verdicts[case])
        faults += [fault] if fault else []
        print(f"{'!' if fault else ' '} {case:28} {verdicts[case]}", flush=True)
    counts = Counter(verdict.result for case, verdict in verdicts.items() if "@" not in case)
    counted = ", ".join(f"{count} {result}" for result, count in counts.most_common())
    print(f"{sum(counts.values())} {table.sweep.counted}: {counted}")
    if update:
        table, faults = update_table(table, verdicts)
        write_table(table)
    return faults


if __name__ == "__main__":
    raise SystemExit(main())
