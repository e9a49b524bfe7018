"""Grammars in llama.cpp's notation, written as llguidance's Lark."""

from treeswarm.errors import BadRequest
from treeswarm.grammar.library import is_installed, why_not_installed

# First line that the conversion writes, which says that all options are the usual ones.
NO_OPTIONS = "%llguidance {}"


def lark_from(text: str) -> str:
    """Return a grammar in Lark's notation, which it may have already.  Raises BadRequest if it has neither form."""
    if not is_installed():
        raise BadRequest(f"grammars cannot be applied here, because {why_not_installed()}")
    from llguidance.gbnf_to_lark import any_to_lark  # noqa: PLC0415 - imports the library

    try:
        lark = str(any_to_lark(text))
    except Exception as error:  # the converter raises errors of its own, and what hostile texts make of it
        raise BadRequest(f"the grammar is neither Lark nor GBNF: {str(error)[:200]}") from None
    return lark.removeprefix(NO_OPTIONS).lstrip("\n")
