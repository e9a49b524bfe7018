"""The sampling defaults that a model's publisher recommends, in `generation_config.json`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treeswarm.errors import BadRequest, ModelError
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.text_rules import TextRules

FILE = "generation_config.json"
SETTINGS = ("temperature", "top_p", "top_k")
RULES = ("repetition_penalty", "min_p", "typical_p", "no_repeat_ngram_size")
# Rules that filter what is sampled from: they change nothing where the likeliest token is chosen.
FILTERS = ("min_p", "typical_p")
# Number of best tokens that transformers samples from where nothing says another one.
TRANSFORMERS_TOP_K = 50


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model's publisher recommends, as far as it is said."""

    samples: bool = False
    """Whether texts are sampled (`do_sample`), as `transformers.generate` does by itself."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """Those of `temperature`, `top_p` and `top_k` that are given, as options of `SwarmClient.stream`."""
    rules: Mapping[str, float] = field(default_factory=dict)
    """Fields of `TextRules` that are given."""
    max_new_tokens: int | None = None

    def transformers_settings(self) -> dict[str, float]:
        """Return the settings with which `transformers.generate` chooses tokens by itself."""
        if not self.samples:
            return {"temperature": 0.0}
        return {"temperature": 1.0, "top_k": TRANSFORMERS_TOP_K, **self.settings}


def rules_from(values: Mapping[str, Any], *, temperature: float) -> TextRules:
    """Return the rules with these fields; at temperature 0 without what only filters samples.  Raises BadRequest."""
    return TextRules(**{name: value for name, value in values.items() if temperature > 0 or name not in FILTERS})


def parse_generation_config(content: Any, path: Path | str) -> GenerationDefaults:
    """Return the defaults in the content of the file at `path`.  Raises ModelError."""
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object: download it again")
    numbers = {
        name: _number(name, content[name], path) for name in (*SETTINGS, *RULES) if content.get(name) is not None
    }
    settings: dict[str, Any] = {name: numbers[name] for name in SETTINGS if name in numbers}
    rules: dict[str, Any] = {name: numbers[name] for name in RULES if name in numbers}
    for whole, values in (("top_k", settings), ("no_repeat_ngram_size", rules)):
        if whole in values:
            values[whole] = int(values[whole])
    length = content.get("max_new_tokens")
    try:
        SamplingSettings(**settings)
        TextRules(**rules)
    except BadRequest as error:
        raise ModelError(f"{path}: {error}; or ignore the file with --generation-config none") from None
    return GenerationDefaults(
        samples=content.get("do_sample") is True,
        settings=settings,
        rules=rules,
        max_new_tokens=length if isinstance(length, int) and not isinstance(length, bool) and length > 0 else None,
    )


def _number(name: str, value: Any, path: Path | str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelError(f"{path} says {name}={value!r}, which is no number: correct it")
    return value
