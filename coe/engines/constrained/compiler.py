"""Compiles grammars for the tokenizer of one model, once each, outside the event loop and the worker thread.

Clients choose the schemas, so a slow one must not delay requests with others: grammars that are kept wait for no
compilation, new ones only for quick ones, and few slow ones wait at a time.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from coe.engines.constrained.checker import GrammarChecker, SlowGrammar
from coe.engines.constrained.grammar import Grammar
from coe.engines.constrained.lane import Lane
from coe.engines.constrained.matcher import Compiled, Matcher, Vocabulary
from coe.engines.constrained.schemas import places
from coe.errors import Rejected, Unsupported
from coe.seam import one_line

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions, LLParserLimits

_MOST_KEPT: Final = 64
"""Compiled grammars that are kept for a model, those of the latest answers."""
_MOST_KEPT_BYTES: Final = 2**22
"""Most bytes of the schemas of kept grammars."""
_MOST_QUICK: Final = 1024
_MOST_SLOW: Final = 8
"""Different grammars of a model that wait to be compiled. A slow one takes up to 2 s of CPU for its check, and then up
to 5 s."""
_MOST_MESSAGE: Final = 400
_OPTIONS: Final[JsonCompileOptions] = {"whitespace_flexible": True, "coerce_one_of": False, "lenient": False}
"""Options of JSON schemas; they take precedence over those that a schema states (`x-guidance`)."""
_SOURCE: Final = re.compile(r"(?:at )?(\d+)\(\d+\): (?:failed to compile JSON schema: )?")
"""Where a problem is in a grammar in Lark: its line, counted from 1, and column."""
_EXCERPT: Final = re.compile(r"\n\s*\d+ \| ")
"""Begins the lines of a grammar that follow a problem."""
_UNIMPLEMENTED: Final = re.compile(r"Unimplemented keys: \[(.*?)\]")


class Grammars:
    """The grammars of one model.

    Args:
        tokenizer: a transformers tokenizer.
        n_tokens: number of token ids of the model.
        checker: checks each grammar first.
    """

    def __init__(self, tokenizer: Any, n_tokens: int, checker: GrammarChecker) -> None:
        self._tokenizer, self._checker = tokenizer, checker
        self._n_tokens = max(n_tokens, len(tokenizer))
        self._kept: OrderedDict[Grammar, Compiled | str] = OrderedDict()
        self._keeping = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._of_library: Any = None
        self._quick = Lane[Compiled | str | None]("grammar", _MOST_QUICK)
        self._slow = Lane[Compiled | str | None]("slow-grammar", _MOST_SLOW)
        self._matchers = ThreadPoolExecutor(1, thread_name_prefix="matcher")

    async def matcher(self, grammar: Grammar, *, expert: str) -> Matcher:
        """A matcher for one answer. The first one of a model takes the time to read its vocabulary (0.5 to 5 s).

        Args:
            expert: name for error messages.

        Raises:
            Rejected: the grammar is invalid, or exceeds a limit; the message names the keyword and its place.
            Overloaded: too many grammars wait to be compiled.
            Unsupported: the tokenizer of this model cannot be constrained.
            EngineError: the process that checks grammars does not run.
        """
        compiled = self._find(grammar)
        if compiled is None:
            compiled = await self._quick.run(grammar, partial(self._compile, grammar, expert, self._checker.problem))
        if compiled is None:
            slow = partial(self._compile, grammar, expert, self._checker.slow_problem)
            compiled = await self._slow.run(grammar, slow)
        if not isinstance(compiled, Compiled):
            field = "tools" if grammar.calls else "response_format"
            raise Rejected(f"{expert!r} cannot answer in the required format: {compiled}", param=field)
        make = partial(Matcher, compiled, self._read_vocabulary(expert), expert)
        return await asyncio.get_running_loop().run_in_executor(self._matchers, make)

    async def constraint(self, grammar: Grammar, *, expert: str) -> dict[str, str]:
        """The grammar for vLLM, which compiles it with llguidance itself, checked as for `matcher`.

        Returns:
            The argument of vLLM's StructuredOutputsParams: `json` (a schema with our options) or `grammar` (Lark).
        """
        await self.matcher(grammar, expert=expert)
        text = self._text(grammar)
        if not grammar.schema:
            return {"grammar": text}
        return {"json": json.dumps(json.loads(text)["grammars"][0]["json_schema"])}

    def close(self) -> None:
        """Compile no more."""
        self._quick.close()
        self._slow.close()
        self._matchers.shutdown(wait=False, cancel_futures=True)

    def _find(self, grammar: Grammar) -> Compiled | str | None:
        """The kept grammar, or its problem."""
        with self._keeping:
            kept = self._kept.get(grammar)
            if kept is None or (isinstance(kept, Compiled) and kept.failed):
                return None
            self._kept.move_to_end(grammar)
            return kept

    def _keep(self, grammar: Grammar, compiled: Compiled | str) -> None:
        with self._keeping:
            self._kept[grammar] = compiled
            self._kept.move_to_end(grammar)
            while len(self._kept) > _MOST_KEPT or self._kept_bytes > _MOST_KEPT_BYTES:
                self._kept.popitem(last=False)

    @property
    def _kept_bytes(self) -> int:
        return sum(each.size for each in self._kept)

    def _compile(self, grammar: Grammar, expert: str, check: Callable[[str], str | None]) -> Compiled | str | None:
        """The compiled grammar, or its problem; `None` if the check takes too long."""
        if (kept := self._find(grammar)) is not None:  # compiled while this waited
            return kept
        try:
            compiled = self._checked(grammar, expert, check)
        except SlowGrammar:
            return None
        self._keep(grammar, compiled)
        return compiled

    def _checked(self, grammar: Grammar, expert: str, check: Callable[[str], str | None]) -> Compiled | str:
        from llguidance import LLMatcher

        vocabulary = self._read_vocabulary(expert)
        text = self._text(grammar)
        # The process that checks has no tokenizer, so special tokens are text there.
        plain = text if grammar.schema else grammar.lark({})
        if (problem := check(plain)) is not None:
            return explained(problem, grammar)
        compiled = LLMatcher(self._of_library, text, log_level=0, limits=_limits())
        if compiled.is_error():
            return explained(compiled.get_error(), grammar)
        shared = Compiled(compiled)
        if not Matcher(shared, vocabulary, expert).allowed(()).any():
            return f"no answer can satisfy {'the parameters of a tool' if grammar.calls else 'its JSON schema'}"
        return shared

    def _read_vocabulary(self, expert: str) -> Vocabulary:
        if self._vocabulary is not None:
            return self._vocabulary
        from llguidance.hf import from_tokenizer

        try:
            library = from_tokenizer(self._tokenizer, n_vocab=self._n_tokens)
        except Exception as error:  # a tokenizer without a fast form, or of a kind that the library does not know
            raise Unsupported(
                f"{expert!r} cannot answer in a required format: its tokenizer ({type(self._tokenizer).__name__}) is "
                f"not supported by llguidance: {one_line(str(error), _MOST_MESSAGE)}"
            ) from error
        spaces = [i for i in range(library.vocab_size) if (data := library.decode_bytes([i])) and not data.strip()]
        whitespace = np.zeros(library.vocab_size, dtype=np.bool_)
        whitespace[spaces] = True
        self._of_library = library
        self._vocabulary = Vocabulary(library.vocab_size, library.eos_token, whitespace)
        return self._vocabulary

    def _text(self, grammar: Grammar) -> str:
        """The grammar in a form that llguidance takes; the vocabulary has been read."""
        from llguidance import LLMatcher

        if grammar.schema:
            return LLMatcher.grammar_from_json_schema(grammar.schema, overrides=_OPTIONS)
        return grammar.lark(self._special_tokens())

    def _special_tokens(self) -> dict[str, int]:
        tokens = self._tokenizer.added_tokens_decoder.items()
        return {token.content: i for i, token in tokens if self._of_library.is_special_token(i)}


def _limits() -> LLParserLimits:
    """Limits of llguidance: for one token some 0.05 s of lexing, for a grammar some 40 MB of states."""
    from llguidance import LLParserLimits

    return LLParserLimits(step_lexer_fuel=100_000, max_lexer_states=20_000, verbose_errors=False)


def explained(problem: str, grammar: Grammar) -> str:
    """The problem of a grammar, with the tool and the place in its schema where these can be found."""
    source = _SOURCE.match(problem)
    text = problem[source.end() :] if source else problem.removeprefix("at ")
    text = one_line(_EXCERPT.split(text, maxsplit=1)[0], _MOST_MESSAGE)
    whose, schemas = "its JSON schema", [grammar.schema]
    if grammar.calls:
        call = grammar.call_of_line(int(source[1])) if source else None
        whose = f"the schema of the parameters of tool {call.tool!r}" if call else "the schema of a tool's parameters"
        schemas = [call.schema] if call else [each.schema for each in grammar.calls]
    found = _UNIMPLEMENTED.search(problem)
    keywords = {name.strip().strip('"') for name in found[1].split(",")} if found else set()
    for schema in schemas:
        for place, name, value in places(json.loads(schema)):
            if name in keywords:
                return f"the keyword {name!r} of {whose} is not supported (at {place:.200})"
            if name == "pattern" and isinstance(value, str) and value and _as_compiled(value) in problem:
                return f"a pattern of {whose} is not supported (at {place:.200}): {text}"
            if name == "oneOf" and "oneOf" in problem:
                return f"oneOf of {whose} has alternatives that may both hold (at {place:.200}): use anyOf"
            if _is_named(name, value, text):
                return f"{whose} cannot be used (at {place:.200}): {text}"
    return f"{whose} cannot be used: {text}"


def _as_compiled(pattern: str) -> str:
    """A pattern as llguidance repeats it: ECMA's digits are those of ASCII."""
    return pattern.replace(r"\d", "[0-9]")


def _is_named(keyword: str, value: Any, problem: str) -> bool:
    """Whether a problem of one line names this value as wrong."""
    if not isinstance(value, str) or not value:
        return False
    if keyword == "$ref":
        return f"'{value.removeprefix('#')}' does not exist" in problem
    return keyword in ("type", "format") and problem.endswith(f"{keyword}: {value}")
