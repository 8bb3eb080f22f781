"""An answer to text, reasoning and tool calls, as it is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from coe.engines.parsing.calls import read_calls
from coe.engines.parsing.ids import CallIds, call_ids
from coe.engines.parsing.response_format import Budget, ResponseFormat, role
from coe.types import Chunk, GenerateRequest, ToolCallDelta

MOST_CALLS: Final = 128
"""Tool calls of one answer; it ends with the last of them."""
_SHARE: Final = 512
"""Text is parsed when its length is this part of what was parsed before. transformers copies the whole answer at each
step: token by token, one of a megabyte would take minutes."""


@dataclass(slots=True)
class _Trimmed:
    """Text without blanks at the ends that markup made: at its start after markup, and before the next markup.

    A newline stands where markup parts two texts: if there were blanks, or always with `parts`.
    """

    after_markup: bool = False
    parts: bool = False
    begun: bool = False
    _blanks: str = ""
    _parted: bool = False

    def add(self, text: str) -> str:
        """The text that may be shown now; blanks at its end wait for what follows."""
        text = self._blanks + text
        gap = ""
        if self.after_markup:
            self._parted = self._parted or text[:1].isspace()
            text = text.lstrip()
            gap = "\n" if text and self._parted and self.begun else ""
        shown = text.rstrip()
        self._blanks = text[len(shown) :]
        self.after_markup = self.after_markup and not shown
        self.begun = self.begun or bool(shown)
        return gap + shown

    def markup(self, *, parts: bool = False) -> None:
        """Markup follows; `parts`: what comes after it is a text of its own."""
        self._parted = self.parts or parts or bool(self._blanks) or (self.after_markup and self._parted)
        self.after_markup, self._blanks = True, ""

    def end(self) -> str:
        """The blanks at the end of the answer."""
        blanks, self._blanks = self._blanks, ""
        return blanks


class AnswerReader(Protocol):
    """Reads one answer as its text comes; see `AnswerParser`."""

    @property
    def parallel(self) -> bool:
        """Whether the answer may have several calls."""
        ...

    @property
    def complete(self) -> bool:
        """Whether nothing that follows is part of the answer."""
        ...

    @property
    def is_cut(self) -> bool:
        """After `finish`, whether the last piece is the text of a call that the answer does not complete."""
        ...

    def feed(self, text: str) -> list[Chunk]:
        """Add generated text. Returns its pieces in order, each of text, reasoning or calls."""
        ...

    def finish(self) -> list[Chunk]:
        """The pieces at the end of the answer."""
        ...


class AnswerParser:
    """Parses one answer. All chunks joined are the same, however the text is divided.

    Text and reasoning are passed on at once, a call when it is complete. A call that is invalid is text, markup
    included.

    Args:
        answers: how the model writes.
        request: offers the tools.
        prompt: the rendered prompt.
        expert: name for error messages.

    Attributes:
        is_cut: after `finish`, whether the last piece is the text of a call that the answer does not complete.
    """

    def __init__(self, answers: ResponseFormat, request: GenerateRequest, prompt: str, *, expert: str = "") -> None:
        self._budget = Budget(expert)
        self._fields: Mapping[str, Any] = answers.template.fields
        self._tools = request.offered
        self.parallel = request.parallel_tool_calls
        self._only, self._demands = request.tool_name, request.tool_choice == "required"
        self.is_cut = False
        self._ids: CallIds = call_ids(request)
        self._parser = answers.parser(prompt, self._budget, calls=bool(self._tools))
        self._text, self._reasoning = _Trimmed(), _Trimmed(after_markup=True, parts=True)
        self._waiting: list[str] = []
        self._n_waiting = self._n_parsed = self.n_calls = 0

    @property
    def complete(self) -> bool:
        """Whether nothing that follows is part of the answer: all calls that the request allows are made."""
        return self.n_calls >= (MOST_CALLS if self.parallel else 1)

    def feed(self, text: str) -> list[Chunk]:
        """Add generated text. Returns its pieces in order, each of text, reasoning or a call.

        Raises:
            TemplateError: the template of the checkpoint takes too much time.
        """
        self._waiting.append(text)
        self._n_waiting += len(text)
        if not text or self._n_waiting * _SHARE < self._n_parsed:
            return []
        return self._parse()

    def finish(self) -> list[Chunk]:
        """The end of the answer."""
        pieces = self._parse()
        _, events = self._parser.finalize()
        self._take(events, pieces, closed=False)
        blanks = "" if self.n_calls else self._text.end()
        if self.is_cut:
            pieces[-1] = Chunk(pieces[-1].text + blanks)
        else:
            _add_text(pieces, blanks)
        return pieces

    def _parse(self) -> list[Chunk]:
        text = "".join(self._waiting)
        self._waiting.clear()
        self._n_parsed, self._n_waiting = self._n_parsed + self._n_waiting, 0
        pieces: list[Chunk] = []
        self._take(self._parser.feed(text), pieces, closed=True)
        return pieces

    def _take(self, events: Sequence[Mapping[str, Any]], pieces: list[Chunk], *, closed: bool) -> None:
        for event in events:
            match event["type"], role(event["field"]):
                case _ if self.complete:
                    return
                case "region_chunk", "content":
                    _add_text(pieces, self._text.add(event["text"]))
                case "region_chunk", "thinking":
                    if reasoning := self._reasoning.add(event["text"]):
                        pieces.append(Chunk("", reasoning=reasoning))
                case "region_open", "content":
                    if self._text.begun and self._fields[event["field"]].open_re is not None:
                        self._text.markup(parts=True)
                case "region_open", "thinking":
                    self._text.markup()
                case "region_close", "thinking":
                    self._reasoning.markup()
                case "region_close", "tool_calls":
                    self._close_calls(event, pieces, closed)

    def _close_calls(self, event: Mapping[str, Any], pieces: list[Chunk], closed: bool) -> None:
        """A region of calls has ended; one without valid calls is text."""
        each, region = self._fields[event["field"]], event["value"]
        calls, rest = read_calls(region, each, self._tools, self._budget)
        if self._only is not None:
            calls = [call for call in calls if call.name == self._only]
        if not calls:
            opening = region.get("opening", "")
            whole = opening + region["body"] + (_closing(each) if closed else "")
            _add_text(pieces, self._text.add(whole))
            self.is_cut = not closed and bool(opening.strip() or self._demands) and bool(whole.strip())
            return
        self._text.markup()
        for call in calls:
            if not self.complete:
                delta = ToolCallDelta(self.n_calls, self._ids[self.n_calls], call.name, call.arguments)
                pieces.append(Chunk("", tool_calls=(delta,)))
                self.n_calls += 1
        if not self.complete:
            _add_text(pieces, self._text.add(rest))


def _add_text(pieces: list[Chunk], text: str) -> None:
    if text:
        pieces.append(Chunk(text))


def _closing(each: Any) -> str:
    """The text that closed a region, if it is the same for all."""
    literals: list[str] | None = each.close_literals
    return literals[0] if literals and len(literals) == 1 else ""
