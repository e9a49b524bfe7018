"""Run types of transformers' causal LMs and print how they fare: `python -m tests.families [TYPE …] [--update]`."""

import argparse
import warnings
from collections import Counter

import transformers

from tests.families.table import read_table, update_table, write_table
from tests.families.verdict import judge


def main() -> int:
    """Print one line per type and the counts; return 1 if the table in `tested_types.toml` says something else."""
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="type, or form `type@form` (default: all)")
    parser.add_argument("--update", action="store_true", help="write what is seen to the table and to docs/models.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    table = read_table()
    verdicts, faults = {}, []
    for case in options.types or table.cases:
        verdicts[case] = judge(case)
        fault = table.find_fault(case, verdicts[case])
        faults += [fault] if fault else []
        print(f"{'!' if fault else ' '} {case:28} {verdicts[case]}", flush=True)
    counts = Counter(verdict.result for case, verdict in verdicts.items() if "@" not in case)
    print(f"{sum(counts.values())} types: " + ", ".join(f"{count} {result}" for result, count in counts.most_common()))
    if options.update:
        table, faults = update_table(table, verdicts)
        write_table(table)
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
