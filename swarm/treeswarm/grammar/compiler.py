"""Compile grammars for a tokenizer, within limits: a node compiles those of strangers."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from treeswarm.errors import BadRequest, ModelError
from treeswarm.grammar.library import grammar_class
from treeswarm.grammar.masks import TextMasks
from treeswarm.grammar.sources import source_of
from treeswarm.model_files import load_tokenizer
from treeswarm.protocol.text_rules import Grammar, RulesRequest

# Token that stands for the end of the text while a grammar is followed.  Which tokens end a text is a matter of the
# request, and the library wants to know it when it reads a tokenizer, which takes a second.
END = "<|treeswarm-end-of-grammar|>"
# The library's own limits, except the number of lexer states, which take up to 2 kB each.
LIMITS = LLParserLimits(max_lexer_states=10_000, verbose_errors=False)
# Number of compiled grammars that are kept.  A program sends the same few schemas again and again.
KEPT = 16
MOST_ERROR_CHARACTERS = 300


@dataclass(eq=False)
class GrammarCompiler:
    """Compiles grammars for one tokenizer.  May be used by several threads."""

    name: str
    """Library, version and tokenizer, as records have them (see `grammar_class`)."""
    vocab_size: int
    """Number of tokens of the model, which may be more than the tokenizer has."""
    _tokenizer: LLTokenizer
    _end: int
    """Id of the token END."""
    _added: frozenset[int]
    """Ids of the tokens that are no part of texts: special and other added ones."""
    _compiled: "OrderedDict[Grammar, LLMatcher]" = field(default_factory=OrderedDict)
    """Matchers at the beginning of their texts, the last used one at the end."""
    _lock: Lock = field(default_factory=Lock)

    @classmethod
    def load(cls, folder: Path, vocab_size: int) -> "GrammarCompiler":
        """Load the tokenizer in `folder`.  Raises ModelError or BadRequest if there is none that the library reads."""
        return cls.of(load_tokenizer(folder), vocab_size, grammar_class(folder, vocab_size))

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, name: str) -> "GrammarCompiler":
        """Return the compiler for a tokenizer, which must not be used for anything else afterwards."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        added = frozenset(tokenizer.get_added_tokens_decoder())
        tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
        end = tokenizer.token_to_id(END)
        assert end is not None
        try:
            library_tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=max(vocab_size, end + 1), eos_token=[end])
        except BaseException as error:
            # What fails inside of the library comes as an error of its own, which is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ModelError(f"the tokenizer cannot be used with grammars: {_one_line(str(error))}") from None
        return cls(name, vocab_size, library_tokenizer, end, added)

    def open(self, request: RulesRequest) -> TextMasks:
        """Return the masks of a request's text; see `GrammarLibrary`."""
        rules = request.rules
        assert rules.grammar is not None
        return self.begin(rules.grammar, rules.end_tokens, request.prompt_length)

    def begin(self, grammar: Grammar, end_tokens: Sequence[int], prompt_length: int = 0) -> TextMasks:
        """Return the masks of a text that follows a grammar; blocks for as long as compiling takes.

        Where the text is complete, `end_tokens` are allowed, and nowhere else, except those that are plain words of
        the vocabulary.  Raises BadRequest if the grammar is wrong or too large, or if no token could end the text.
        """
        ends = [token for token in end_tokens if token in self._added] or list(end_tokens)
        if not ends:
            raise BadRequest("a grammar needs a token that ends its text: leave out ignore_eos")
        matcher = self.compile(grammar).deep_copy()
        return TextMasks(matcher, self.vocab_size, self._end, tuple(ends), prompt_length, lambda: self._forget(grammar))

    def compile(self, grammar: Grammar) -> LLMatcher:
        """Return the matcher at the beginning of a grammar's texts, which is kept for the next time.

        Raises BadRequest if the grammar is wrong or too large.
        """
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
        matcher = LLMatcher(self._tokenizer, source_of(grammar), log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise BadRequest(f"the grammar cannot be used: {_one_line(matcher.get_error())}")
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return matcher

    def _forget(self, grammar: Grammar) -> None:
        """Compile a grammar anew the next time: its matchers share lexer states, and one may have had too many."""
        with self._lock:
            self._compiled.pop(grammar, None)


def _one_line(error: str) -> str:
    """Return the library's error on one line, without the grammar that it repeats."""
    return " ".join(error.split())[:MOST_ERROR_CHARACTERS]
