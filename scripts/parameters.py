"""Write the tables of parameters into docs/api.md: `python scripts/parameters.py`, after a change of the table."""

import re
from pathlib import Path

from treeswarm_client.gateway.parameters.documents import parameter_tables

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
BETWEEN = re.compile(r"(<!-- parameters: [^\n]*-->\n).*(<!-- end of parameters -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """Return the page with the tables of now."""
    return BETWEEN.sub(lambda marks: f"{marks[1]}\n{parameter_tables()}\n{marks[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")
