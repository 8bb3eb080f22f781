"""ParsedAnswer: one answer that a parser of vLLM reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from coe.engines.parsing.ids import call_ids
from coe.engines.parsing.parser import MOST_CALLS
from coe.engines.vllm.patterns import limit_patterns
from coe.errors import EngineError
from coe.seam import text_of
from coe.types import Chunk, GenerateRequest, ToolCallDelta

MOST_SECONDS: Final = 10.0
"""CPU time of a parser for one answer; an ordinary one takes less than 0.1."""
_SHARE: Final = 512
"""Text is parsed when its length is this part of what was parsed before: many parsers read the whole answer again at
each step."""
_STATED_ID: Final = "functions."
"""How an id begins that a model reads in its prompt (Kimi K2); vLLM's other ids are random."""


class ParsedAnswer:
    """Reads one answer with a parser of vLLM: streamed, by steps; whole, at its end, as `vllm serve` does.

    An answer that may end at a stop string is read by steps, too.

    Args:
        parser: vLLM's, made for this answer.
        asked: the request as vLLM's parsers read it.
        request: the same.
        prompt_ids: tokens of the prompt.
        expert: name for error messages.

    Attributes:
        parallel: whether the answer may have several calls.
        complete: whether nothing that follows is part of the answer.
        is_cut: never: vLLM shows the text of a call that the answer does not complete as the parser decides.
    """

    is_cut: Final = False

    def __init__(
        self, parser: Any, asked: Any, request: GenerateRequest, prompt_ids: Sequence[int], *, expert: str
    ) -> None:
        self._parser, self._asked, self._expert = parser, asked, expert
        self._prompt_ids = list(prompt_ids)
        self._steps = request.stream or bool(request.stop)
        self._ids = call_ids(request)
        self.parallel = request.parallel_tool_calls
        self.complete = False
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._n_waiting = self._n_parsed = 0
        self._indexes: dict[int, int] = {}  # vLLM's index of a call -> ours, which leaves out none
        self._left_s = MOST_SECONDS
        limit_patterns(parser, lambda: self._left_s)

    def push(self, token: int) -> None:
        """Add a generated token; its text follows with `feed`, except that of an end token."""
        self._tokens.append(token)

    def feed(self, text: str) -> list[Chunk]:
        """Add generated text. Returns its pieces in order, each of text, reasoning or calls.

        Raises:
            EngineError: the parser failed, or takes too much time.
        """
        self._text.append(text)
        self._n_waiting += len(text)
        if not self._steps or not self._tokens or self._n_waiting * _SHARE < self._n_parsed:
            return []
        return self._step(finished=False)

    def finish(self) -> list[Chunk]:
        """The end of the answer. Raises EngineError as `feed`."""
        if self.complete:
            return []
        return self._step(finished=True) if self._steps else self._whole()

    def _step(self, *, finished: bool) -> list[Chunk]:
        text, tokens = self._taken()
        delta = self._run(
            lambda: self._parser.parse_delta(text, tokens, self._asked, self._prompt_ids, finished=finished)
        )
        if delta is None:
            return []
        found = ((each.index, each.id, each.function) for each in delta.tool_calls or ())
        calls = tuple(
            piece
            for index, stated, function in found
            if function is not None and (piece := self._call(index, stated, function.name, function.arguments))
        )
        return self._pieces(delta.reasoning, delta.content, calls)

    def _whole(self) -> list[Chunk]:
        text, tokens = self._taken()
        self._run(lambda: self._parser.set_prompt_token_ids(self._prompt_ids))
        reasoning, content, found = self._run(
            lambda: self._parser.parse(text, self._asked, enable_auto_tools=True, model_output_token_ids=tokens)
        )
        calls = (self._call(i, each.id, each.name, each.arguments) for i, each in enumerate(found or ()))
        return self._pieces(reasoning, content, tuple(filter(None, calls)))

    def _taken(self) -> tuple[str, list[int]]:
        text, tokens = "".join(self._text), self._tokens
        self._text, self._tokens = [], []
        self._n_parsed, self._n_waiting = self._n_parsed + self._n_waiting, 0
        return text, tokens

    def _pieces(self, reasoning: str | None, content: str | None, calls: tuple[ToolCallDelta, ...]) -> list[Chunk]:
        return list(_not_empty(Chunk("", reasoning=reasoning or ""), Chunk(content or ""), Chunk("", tool_calls=calls)))

    def _call(self, index: int, stated: str | None, name: str | None, arguments: str | None) -> ToolCallDelta | None:
        """A piece of a call; None if the answer may not have the call, and is complete."""
        if self.complete:
            return None
        first = index not in self._indexes
        if first and len(self._indexes) >= (MOST_CALLS if self.parallel else 1):
            self.complete = True
            return None
        ours = self._indexes.setdefault(index, len(self._indexes))
        of_model = stated if stated and stated.startswith(_STATED_ID) else self._ids[ours]
        return ToolCallDelta(ours, of_model if first else "", name or "", arguments or "")

    def _run(self, parse: Callable[[], Any]) -> Any:
        """What vLLM's parser returns. Whatever it raises is about this answer."""
        began = time.thread_time()
        try:
            found = parse()
        except Exception as error:
            raise EngineError(
                f"vLLM's parser failed on the answer of {self._expert!r}: {type(error).__name__}: {text_of(error)}",
                public=f"the answer of {self._expert!r} cannot be read by its parser",
            ) from error
        self._left_s -= time.thread_time() - began
        if self._left_s <= 0:
            raise EngineError(f"vLLM's parser takes more than {MOST_SECONDS:g} s for an answer of {self._expert!r}")
        return found


def _not_empty(*chunks: Chunk) -> Iterator[Chunk]:
    return (chunk for chunk in chunks if not chunk.is_empty)
