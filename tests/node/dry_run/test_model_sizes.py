"""The table of models in docs/models.md is what `scripts/model_sizes.py` computes."""

import warnings
from typing import Any

import pytest
import transformers
from tests.support.scripts import load_script

script = load_script("model_sizes")
# Largest accepted distance from the number of parameters that the publisher names, as a share of it.  Publishers round,
# and some count layers for several tokens at once.
TOLERANCE = 0.04


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()


def rows_of_page() -> list[str]:
    section = script.PAGE.read_text("utf-8").partition(script.BEGIN)[2].partition(script.END)[0].strip()
    assert section.startswith(script.HEAD)
    return section.removeprefix(script.HEAD).strip().splitlines()


def test_page_has_the_models_of_the_script_in_their_order() -> None:
    assert [row.split("|")[1].strip() for row in rows_of_page()] == [model.name for model in script.MODELS]


@pytest.mark.slow  # a second of processor time for each
@pytest.mark.parametrize("model", script.MODELS, ids=lambda model: model.name)
def test_row_is_what_a_dry_run_computes(model: Any) -> None:
    found = script.appraise_numbers(model)
    assert script.table_row(model, found) in rows_of_page(), "run `python scripts/model_sizes.py`"
    if found.sizes is not None:
        assert found.sizes.parameters / 1e9 == pytest.approx(model.billions, rel=TOLERANCE)
