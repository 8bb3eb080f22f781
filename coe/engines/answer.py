"""The tokens of one answer to text, reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from coe.engines import chat
from coe.engines.constrained.grammar import CallForm, Grammar
from coe.engines.parsing.parser import AnswerParser, AnswerReader
from coe.engines.parsing.response_format import ResponseFormat
from coe.engines.parsing.text import SpecialTokens, TextStream, without_marks
from coe.types import Chunk, GenerateRequest

_TOKENS_BEFORE: Final = 8
"""Last tokens of a plain prompt that an answer is decoded with, as its continuation."""


class AnswerStream:
    """Chunks of one answer as its tokens come. Stop strings are matched in its text, not in reasoning or in calls, nor
    in a call that the end of the answer cuts.

    If the request demands a call, nothing is shown before the first one: without it the answer fails, and another
    expert may answer.

    Args:
        text: detokenises, and knows the stop strings.
        parser: of the model's format; without one, all is text. It is fed the text of `text`.
        demands: whether the request demands a call.

    Attributes:
        n_calls: number of tool calls up to here.
    """

    def __init__(self, text: TextStream, parser: AnswerReader | None = None, *, demands: bool = False) -> None:
        self._text, self._parser, self._demands = text, parser, demands
        self._held: list[Chunk] = []
        self.n_calls = 0
        self.push, self.push_end = text.push, text.push_end

    @property
    def stopped(self) -> bool:
        """Whether the answer is complete: up to a stop string, or with the one call that the request allows."""
        return self._text.stopped or (self._parser is not None and self._parser.complete)

    @property
    def watches(self) -> bool:
        """Whether every token must be read, since it may complete the answer."""
        return self._text.watches or (self._parser is not None and not self._parser.parallel)

    @property
    def lacks_call(self) -> bool:
        """Whether the request demands a call, and there is none."""
        return self._demands and not self.n_calls

    def take(self, *, last: bool = False, search: bool = True) -> Chunk:
        """What may be shown now; see `TextStream.take`.

        Raises:
            TemplateError: the response template of the model takes too much time.
        """
        if self._parser is None:
            return self._unheld(Chunk(self._text.take(last=last, search=search)), last)
        if self._text.stopped:
            return self._unheld(Chunk(""), last)
        pieces, cut = self._parser.feed(self._text.tokens.take(last=last)), None
        if last:
            pieces += self._parser.finish()
            cut = pieces.pop() if self._parser.is_cut else None
        return self._unheld(self._shown(pieces, cut, last, search), last)

    def _shown(self, pieces: Iterable[Chunk], cut: Chunk | None, last: bool, search: bool) -> Chunk:
        """The pieces up to a stop string in their text, and a call that is cut, as one chunk."""
        shown: list[Chunk] = []
        for piece in pieces:
            text = self._text.stops.take(piece.text, search=search)
            shown.append(replace(piece, text=text, reasoning=without_marks(piece.reasoning)))
            if self._text.stopped:
                break
            self.n_calls += sum(bool(call.id) for call in piece.tool_calls)  # the first piece of a call has the id
        if last:
            shown.append(Chunk(self._text.stops.take("", last=True, search=search)))
        if cut is not None and not self._text.stopped:
            shown.append(replace(cut, text=without_marks(cut.text)))
        return _joined(shown)

    def _unheld(self, chunk: Chunk, last: bool) -> Chunk:
        if self.lacks_call and not last:
            self._held.append(chunk)
            return Chunk("")
        if not self._held:
            return chunk
        chunk, self._held = _joined([*self._held, chunk]), []
        return chunk


def _joined(pieces: Sequence[Chunk]) -> Chunk:
    return Chunk(
        "".join(piece.text for piece in pieces),
        reasoning="".join(piece.reasoning for piece in pieces),
        tool_calls=tuple(call for piece in pieces for call in piece.tool_calls),
    )


class AnswerStreams:
    """Makes the `AnswerStream` of each request to one model.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._special = SpecialTokens(chat.special_tokens(tokenizer))
        self._formats: dict[tuple[str | None, int], ResponseFormat | None] = {}

    def stream(
        self,
        request: GenerateRequest,
        prompt: str,
        prompt_ids: Sequence[int],
        style: chat.ChatStyle,
        ends: Collection[int],
        *,
        expert: str,
    ) -> AnswerStream:
        """The stream of an answer.

        Args:
            prompt, prompt_ids: as rendered, and its tokens.
            style: of the adapter, if there is one.
            ends: tokens that end an answer.
            expert: name for error messages.
        """
        special = self._special.within(request.stop)
        if request.stop:
            special |= chat.texts_of(self._tokenizer, ends)
        if not request.messages:
            return AnswerStream(TextStream(self._decode, request.stop, special, prompt_ids[-_TOKENS_BEFORE:]))
        # An answer in a required format begins at once, and has no reasoning, though the prompt may open one.
        is_text = request.format == "json" and not demands_call(request)
        answers = None if is_text else self._format(request, style.on(self._tokenizer, expert), expert)
        if answers is None:
            return AnswerStream(TextStream(self._decode, request.stop, special))
        kept = {i: text for i, text in self._special.within(answers.delimiters).items() if i not in ends}
        text = TextStream(self._decode, request.stop, special, kept=kept)
        parser = AnswerParser(answers, request, prompt, expert=expert)
        return AnswerStream(text, parser, demands=demands_call(request))

    def grammar(self, request: GenerateRequest, prompt: str, style: chat.ChatStyle, *, expert: str) -> Grammar | None:
        """What an answer must look like in which a call is demanded; `None` if none is.

        A prompt that has opened reasoning is continued by its end.

        Raises:
            Rejected: a schema of a tool is too large or too deep.
        """
        if not demands_call(request):
            return None
        answers = self._format(request, style.on(self._tokenizer, expert), expert)
        assert answers is not None and answers.calls is not None and answers.calls.call is not None  # by `_format`
        form, closing = answers.calls.call, answers.closing(prompt)
        tools = [tool["function"] for tool in request.offered]
        calls = []
        for tool in tools:
            if request.tool_name in (None, tool["name"]):
                before, after = form.of(tool["name"])
                parameters = _object_schema(tool.get("parameters"))
                calls.append(CallForm.of(before, parameters, after, tool=tool["name"]))
        several = request.parallel_tool_calls and request.tool_name is None and form.separator is not None
        return Grammar.of_calls(calls, before=closing, separator=form.separator or "", several=several)

    def _format(self, request: GenerateRequest, style: chat.ChatStyle, expert: str) -> ResponseFormat | None:
        template = style.template_for(request)
        key = template, id(style.response_template)
        if key not in self._formats:
            self._formats[key] = ResponseFormat.of(template, style.response_template, expert=expert)
        found = self._formats[key]
        if demands_call(request) and (found is None or found.calls is None or found.calls.call is None):
            return ResponseFormat.plain_call()
        return found


def demands_call(request: GenerateRequest) -> bool:
    """Whether the answer must be a call of a tool."""
    return bool(request.offered) and request.tool_choice == "required"


def _object_schema(parameters: Any) -> dict[str, Any]:
    """The schema of the arguments, which are an object whatever it states."""
    return {**(parameters if isinstance(parameters, Mapping) else {}), "type": "object"}
