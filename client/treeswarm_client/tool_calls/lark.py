"""Write grammars in llguidance's dialect of Lark, of texts that contain special tokens.  Pure."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ANY_TEXT = r"/(.|\n)*/"
# A function without parameters takes an empty object, not any object.
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Item:
    """One item of a sequence."""

    expression: str
    is_required: bool


@dataclass
class LarkWriter:
    """Writes the rules of one grammar."""

    special: Mapping[str, int]
    """Special tokens of the tokenizer with their ids: in texts they are tokens, not characters."""
    _rules: list[str] = field(default_factory=list)

    def grammar(self, start: str) -> str:
        """Return the grammar whose texts are those of the expression `start`."""
        return "\n".join([f"start: {start}", *self._rules])

    def rule(self, expression: str, attributes: str = "") -> str:
        """Add a rule and return its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {expression}")
        return name

    def add(self, name: str, expression: str) -> None:
        """Add a rule with a name of its own, to which its expression may refer."""
        self._rules.append(f"{name}: {expression}")

    def text(self, text: str) -> str:
        """Return the expression of a fixed text."""
        if not text:
            return ""
        if not self.special:
            return json.dumps(text, ensure_ascii=False)
        special = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        parts = [part for part in re.split(f"({special})", text) if part]
        return " ".join(
            f"<[{self.special[part]}]>" if part in self.special else json.dumps(part, ensure_ascii=False)
            for part in parts
        )

    def up_to(self, end: str) -> str:
        """Return the expression of any text with `end` after it."""
        if any(token in end for token in self.special):
            return f"{self.rule(ANY_TEXT)} {self.text(end)}"
        escaped = re.escape(end).replace("/", r"\/").replace("\n", "n")
        return self.rule(rf"/(.|\n)*{escaped}/", "[lazy]")

    def json(self, schema: Any) -> str:
        """Return the expression of JSON that a schema allows."""
        return self.rule(f"%json {json.dumps(schema, ensure_ascii=True)}")

    def arguments(self, schema: Mapping[str, Any]) -> str:
        """Return the expression of a function's arguments: an object with its parameters and no others."""
        return self.json({"additionalProperties": False, **(schema or NO_PARAMETERS)})

    def either(self, expressions: Sequence[str]) -> str:
        """Return the expression of one of several."""
        return self.rule(" | ".join(expressions))

    def repeated(self, expression: str, between: str, *, several: bool) -> str:
        """Return an expression, several times if that is wanted."""
        return f"{expression} ({between} {expression})*" if several else expression

    def sequence(self, items: Sequence[Item], between: str) -> str:
        """Return the expression of items in their order, those that are not required or not."""
        if not items:
            return ""
        # Rule `rests[i]` stands for the items from the i-th on, each with the separator before it.
        rests = [""]
        for item in reversed(items):
            one = f"{between} {item.expression}"
            rests.append(self.rule(f"{one if item.is_required else f'({one})?'} {rests[-1]}"))
        rests.reverse()
        firsts = []
        for at, item in enumerate(items):
            firsts.append(f"{item.expression} {rests[at + 1]}")
            if item.is_required:
                return self.either(firsts)
        return f"({self.either(firsts)})?"


def parameters(schema: Mapping[str, Any]) -> list[tuple[str, Any, bool]]:
    """Return name, schema and whether it is required of every parameter of a function."""
    properties, required = schema.get("properties") or {}, schema.get("required") or ()
    definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    return [
        (name, {**one, **definitions} if isinstance(one, dict) else one, name in required)
        for name, one in properties.items()
    ]
