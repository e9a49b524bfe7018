"""The rules of sessions at the tail: what they change in the logits of a step, and a side thread for grammars."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.errors import BadRequest, Refused
from treeswarm.protocol.messages import FaultCode
from treeswarm.protocol.text_rules import RulesRequest
from treeswarm.session.grammars import GrammarLibrary, GrammarPaths
from treeswarm.session.logit_edits import LogitEdits, RuledText
from treeswarm.session.paths import RowPaths
from treeswarm.session.session import answered_ids
from treeswarm.session.steps import Step

Masks = NDArray[np.uint32]

# Seconds that a forward waits for a grammar's masks.  Those of a tree take some milliseconds; a grammar that takes
# longer must not hold up the other sessions of the node.
LONGEST_WAIT_S = 2.0


@dataclass(frozen=True, eq=False)
class StepRules:
    """Rules for the answered rows of one step, prepared before it waits for the device."""

    text: RuledText
    ids: NDArray[np.uint32]
    """Ids of the tree nodes that were to be answered, rising."""
    masks: "Future[Masks] | None" = None
    """What a grammar allows after each of them, or None without a grammar."""

    def edits(self, step: Step) -> LogitEdits:
        """Return what the rules change in the answered rows of the step as it runs.  Called in the device thread.

        Raises Refused if the grammar cannot be applied.
        """
        assert step.paths is not None
        masks = None
        if self.masks is not None:
            masks = _wait_for(self.masks)[np.searchsorted(self.ids, answered_ids(step))]
        return self.text.edits(step.paths.select(step.answered), masks)


@dataclass(eq=False)
class SessionRules:
    """The rules of one session."""

    request: RulesRequest
    grammar: "SessionGrammar | None" = None
    _text: RuledText = field(init=False)

    def __post_init__(self) -> None:
        self._text = RuledText(self.request)

    def prepare(self, step: Step) -> StepRules:
        """Return the rules of a step that is about to wait for the device; steps come in order."""
        assert step.paths is not None
        masks = None
        if self.grammar is not None and len(step.answered):
            masks = self.grammar.start(step.paths.select(step.answered))
        return StepRules(self._text, answered_ids(step), masks)


class SessionGrammar:
    """The grammar of one session, which is compiled and followed on a side thread."""

    def __init__(self, library: GrammarLibrary, request: RulesRequest, thread: ThreadPoolExecutor) -> None:
        """Start to compile the grammar."""
        self._thread = thread
        self._compiled: Future[GrammarPaths] = thread.submit(library.open, request)

    def start(self, paths: RowPaths) -> "Future[Masks]":
        """Start to compute what the grammar allows after each path."""
        return self._thread.submit(lambda: self._compiled.result().allowed(paths))


class GrammarThread:
    """Applies a library of grammars on one thread, so that the device never waits for it alone."""

    def __init__(self, library: GrammarLibrary) -> None:
        """Start no thread before the first grammar."""
        self.library = library
        self._thread = ThreadPoolExecutor(1, "grammar")

    def open(self, request: RulesRequest) -> SessionGrammar:
        """Return the grammar of a new session."""
        return SessionGrammar(self.library, request, self._thread)

    def close(self) -> None:
        """End the thread; what waits for it is given up."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _wait_for(masks: "Future[Masks]") -> Masks:
    try:
        return masks.result(LONGEST_WAIT_S)
    except BadRequest as error:
        raise Refused(str(error), FaultCode.BAD_RULES) from error
    except TimeoutError:
        raise Refused(f"the grammar took longer than {LONGEST_WAIT_S:g} s for one tree", FaultCode.BAD_RULES) from None
    except Exception as error:  # a library that fails ends its own session, never the node
        raise Refused(f"the grammar cannot be followed: {error}", FaultCode.INTERNAL) from error
