"""The compiler of a model's grammars, loaded when the first grammar needs it."""

from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from treeswarm.errors import BadRequest
from treeswarm.grammar.library import is_installed, why_not_installed

if TYPE_CHECKING:
    from treeswarm.grammar.compiler import GrammarCompiler


@dataclass(eq=False)
class GrammarLoader:
    """Loads the compiler for the tokenizer in a directory, once.  May be used by several threads."""

    folder: Path
    vocab_size: int
    _compiler: "GrammarCompiler | None" = None
    _lock: Lock = field(default_factory=Lock)

    def load(self) -> "GrammarCompiler":
        """Return the compiler; the first call takes up to a second.

        Raises BadRequest without the library, and ModelError if it cannot read the tokenizer.
        """
        with self._lock:
            if self._compiler is None:
                if not is_installed():
                    raise BadRequest(f"grammars cannot be applied here, because {why_not_installed()}")
                from treeswarm.grammar.compiler import GrammarCompiler  # noqa: PLC0415 - imports the library

                self._compiler = GrammarCompiler.load(self.folder, self.vocab_size)
            return self._compiler
