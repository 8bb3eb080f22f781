"""vLLM's parsers of tool calls and reasoning, by the names of `vllm serve --tool-call-parser` and `--reasoning-parser`.

An expert that names one has its answers read by it. Others, and answers in a required format or with a demanded call,
which follow a grammar of this project, are read as for the hf engine.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from coe.engines import chat
from coe.engines.answer import AnswerStream, demands_call
from coe.engines.conversation import template_choices
from coe.engines.parsing.text import SpecialTokens, TextStream
from coe.engines.vllm.parsed import ParsedAnswer
from coe.errors import CoeError, ConfigError, EngineError
from coe.seam import text_of
from coe.types import GenerateRequest
from registry.spec import ExpertSpec
from registry.spelling import did_you_mean

_OWN: Final = "hf"
"""vLLM's parser of a checkpoint's response template, whose patterns it runs without a limit of time."""
_LOGGERS: Final = ("vllm.tool_parsers", "vllm.reasoning", "vllm.parser")
"""Loggers of the parsers, which log a traceback and parts of an answer for each call that is malformed."""


@dataclass(frozen=True, slots=True)
class ParserNames:
    """The parsers that an expert names; None where it names none."""

    tool_call: str | None = None
    reasoning: str | None = None

    @classmethod
    def of(cls, spec: ExpertSpec, base: ExpertSpec | None = None) -> ParserNames:
        """Those of the expert, of an adapter those of its base where it names none."""
        stated = cls(spec.tool_call_parser, spec.reasoning_parser)
        if base is None:
            return stated
        return cls(stated.tool_call or base.tool_call_parser, stated.reasoning or base.reasoning_parser)

    def __bool__(self) -> bool:
        return self.tool_call is not None or self.reasoning is not None

    def check(self, *, expert: str) -> None:
        """Imports vLLM.

        Raises:
            ConfigError: vLLM has no such parser, with near matches, or it may not be used here.
        """
        if not self:
            return
        from vllm.reasoning import ReasoningParserManager
        from vllm.tool_parsers import ToolParserManager

        _check(self.tool_call, ToolParserManager.list_registered(), "tool_call_parser", expert)
        _check(self.reasoning, ReasoningParserManager.list_registered(), "reasoning_parser", expert)


def _check(name: str | None, known: Collection[str], field: str, expert: str) -> None:
    if name == _OWN:
        raise ConfigError(
            f"`{field}: {_OWN}` of {expert!r} runs patterns of the checkpoint without a limit of time: leave it out, "
            "and the response template of the checkpoint is read within limits"
        )
    if name is not None and name not in known:
        usable = sorted(set(known) - {_OWN})
        close = did_you_mean(name, usable, most=3) or did_you_mean(name, usable, listed=True)
        raise ConfigError(
            f"`{field}` of {expert!r}: vLLM has no parser {name!r}{close}; it takes the names of "
            f"`vllm serve --{field.replace('_', '-')}`"
        )


class AnswerParsers:
    """Makes the parser of each answer of one model. It must be made where vLLM is imported already.

    Args:
        tokenizer: of transformers.
        model_config: vLLM's.
    """

    def __init__(self, tokenizer: Any, model_config: Any) -> None:
        self._tokenizer, self._config = tokenizer, model_config
        self._special = SpecialTokens(chat.special_tokens(tokenizer))
        self._cached: Any = None
        self._classes: dict[ParserNames, Any] = {}

    def load(self, names: ParserNames, *, expert: str) -> Any:
        """The class of vLLM's parser. Blocks when it is first loaded.

        Raises:
            ConfigError: there is no such parser, or it does not fit the tokenizer.
        """
        if names not in self._classes:
            names.check(expert=expert)
            self._classes[names] = self._load(names, expert)
        return self._classes[names]

    def _load(self, names: ParserNames, expert: str) -> Any:
        from vllm.parser import ParserManager
        from vllm.tokenizers.hf import get_cached_tokenizer

        for logger in _LOGGERS:
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        if self._cached is None:
            self._cached = get_cached_tokenizer(self._tokenizer)  # parsers read the whole vocabulary for each answer
        try:
            return ParserManager.get_parser(
                tool_parser_name=names.tool_call,
                reasoning_parser_name=names.reasoning,
                enable_auto_tools=True,
                model_name=expert,
                is_harmony=self._config.hf_config.model_type == "gpt_oss",
                tokenizer=self._cached,
            )
        except Exception as error:
            raise ConfigError(
                f"the parsers of {expert!r} cannot be used (tool_call_parser {names.tool_call!r}, reasoning_parser "
                f"{names.reasoning!r}): {text_of(error)}"
            ) from error

    def stream(
        self,
        names: ParserNames,
        request: GenerateRequest,
        prompt_ids: Sequence[int],
        ends: Collection[int],
        *,
        expert: str,
    ) -> AnswerStream:
        """The stream of an answer to a conversation.

        Args:
            prompt_ids: tokens of the prompt, whose end may have begun reasoning.
            ends: tokens that end an answer.
            expert: name for error messages.

        Raises:
            ConfigError: as `load`.
            EngineError: vLLM cannot make the parser for this request.
        """
        kind = self.load(names, expert=expert)
        try:
            asked = vllm_request(request)
            parser = kind(
                self._cached,
                asked.tools,
                chat_template_kwargs=asked.chat_template_kwargs,
                model_config=self._config,
            )
            skips = parser.adjust_request(asked.model_copy()).skip_special_tokens
        except CoeError:
            raise
        except Exception as error:
            raise EngineError(
                f"vLLM's parsers of {expert!r} do not take the request: {type(error).__name__}: {text_of(error)}"
            ) from error
        decode = partial(self._tokenizer.decode, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
        special = self._special.within(request.stop)
        if request.stop:
            special |= chat.texts_of(self._tokenizer, ends)
        answer = ParsedAnswer(parser, asked, request, prompt_ids, expert=expert)
        return AnswerStream(ReadText(decode, request.stop, special, answer), answer)


class ReadText(TextStream):
    """A text whose tokens its parser reads, too."""

    def __init__(self, decode: Any, stop: Sequence[str], special: Mapping[int, str], answer: ParsedAnswer) -> None:
        super().__init__(decode, stop, special)
        self._answer = answer

    def push(self, token: int) -> None:
        """Add a token."""
        self._answer.push(token)
        super().push(token)

    def push_end(self, token: int) -> None:
        """Add a token that ends the answer, and has no text."""
        self._answer.push(token)
        super().push_end(token)


def reads_with_parser(request: GenerateRequest) -> bool:
    """Whether a parser of vLLM may read the answer: it is to a conversation, and follows no grammar of ours."""
    return bool(request.messages) and request.format != "json" and not demands_call(request)


def vllm_request(request: GenerateRequest) -> Any:
    """What vLLM's parsers read of a request, as its ChatCompletionRequest.

    Messages are not validated: they were, and the parsers only count the calls in them. Tools are not strict, and
    parallel calls are allowed, so that vLLM makes no grammar.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionToolsParam

    functions = [
        {name: value for name, value in tool["function"].items() if name != "strict"} for tool in request.offered
    ]
    tools = [ChatCompletionToolsParam(type="function", function=function) for function in functions]
    return ChatCompletionRequest.model_construct(
        messages=[message.document() for message in request.messages],
        tools=tools or None,
        tool_choice="auto" if tools else "none",
        chat_template_kwargs=template_choices(request),
    )
