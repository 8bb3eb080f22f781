"""Texts to token ids, raw or as the expert's chat template renders them, with the characters of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coe.engines import chat
from coe.engines.latent.spans import Turns, UserText, no_spans
from coe.engines.render import Renderer
from coe.errors import CoeError, Rejected, TemplateError
from coe.types import GenerateRequest
from routers.base import Message


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text that an expert reads.

    Attributes:
        span: characters [start, end) of the text that a place is at the end of.
        name: what error messages call it.
    """

    text: str
    span: tuple[int, int] | None = None
    name: str = "the prompt"


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Token ids of a prompt.

    Attributes:
        ids: with a beginning-of-text token, where the model takes one.
        spans: (n, 2) characters [start, end) of `prompt.text` of each token, -1 for those of the template.
    """

    prompt: Prompt
    ids: list[int]
    spans: NDArray[np.int32]

    def last_of_span(self) -> int:
        """Position of the last token that has a character of the prompt's span.

        Raises:
            Rejected: the prompt has no span, or no token of it.
        """
        if self.prompt.span is None:
            raise Rejected(f"{self.prompt.name}: it has no span; the row needs a `word` that the text has, or a `span`")
        start, end = self.prompt.span
        found = np.flatnonzero((self.spans[:, 0] < end) & (self.spans[:, 1] > start) & (self.spans[:, 0] >= 0))
        if not len(found):
            raise Rejected(f"{self.prompt.name}: no token has the characters {start} to {end} of the text")
        return int(found[-1])


@dataclass(frozen=True, slots=True)
class _Turns:
    """Where a template puts the user's text; None if it cannot be determined: then the text is searched."""

    known: Turns | None


class PromptEncoder:
    """Encodes prompts for one expert.

    Args:
        tokenizer: of the model, or of the adapter's base.
        expert: its name, for messages.
        style: of the adapter.
        renderer: renders the chat template; None reads prompts raw.
        most_tokens: of a prompt; one with many more is refused before all of it is tokenized.
    """

    def __init__(
        self, tokenizer: Any, expert: str, style: chat.ChatStyle, renderer: Renderer | None, most_tokens: int
    ) -> None:
        self._tokenizer, self._expert, self._style, self._renderer = tokenizer, expert, style, renderer
        self._most_tokens = most_tokens
        self._turns: _Turns | None = None

    def encode(self, prompts: Sequence[Prompt]) -> list[PromptTokens]:
        """The tokens of each prompt; with a renderer, of one user message with the generation prompt to the end.

        Raises:
            Rejected: a text is empty or much too long, the expert has no chat template, or it rejects the text.
            TemplateError: the template is broken.
        """
        if self._renderer is None:
            requests = [GenerateRequest(prompt=prompt.text) for prompt in prompts]
            texts, turns = [prompt.text for prompt in prompts], None
        else:
            requests = [GenerateRequest(messages=(Message("user", prompt.text),)) for prompt in prompts]
            if self._turns is None:
                self._turns = self._read_turns(self._renderer)
            texts, turns = self._rendered(requests, prompts, self._renderer), self._turns.known
        return [
            self._tokens(prompt, text, UserText.find(text, request, turns))
            for prompt, text, request in zip(prompts, texts, requests, strict=True)
        ]

    def _rendered(
        self, requests: Sequence[GenerateRequest], prompts: Sequence[Prompt], renderer: Renderer
    ) -> list[str]:
        jobs = [chat.render(self._tokenizer, each, renderer, self._style, expert=self._expert) for each in requests]
        texts = []
        for job, prompt in zip(jobs, prompts, strict=True):
            try:
                texts.append(job.result())
            except CoeError as error:
                raise _placed(error, prompt) from error
        return texts

    def _read_turns(self, renderer: Renderer) -> _Turns:
        request = GenerateRequest(messages=(Message("user", "-"),))
        try:
            template = self._style.on(self._tokenizer, self._expert).template_for(request)
        except Rejected:
            raise Rejected(
                f"{self._expert!r} has no chat template, so it takes no messages: read the texts as they are (--raw)"
            ) from None
        assert template is not None  # as `ChatStyle.on` ensures
        special = self._tokenizer.special_tokens_map
        try:
            return _Turns(Turns.read(template, request, special, renderer, expert=self._expert))
        except (TemplateError, Rejected):
            return _Turns(None)

    def _tokens(self, prompt: Prompt, text: str, user: UserText | None) -> PromptTokens:
        try:
            chat.check_length(self._tokenizer, text, self._most_tokens, expert=self._expert)
            ids = chat.encode_text(self._tokenizer, text, expert=self._expert)
        except CoeError as error:
            raise _placed(error, prompt) from error
        spans = no_spans(len(ids)) if user is None else user.spans(self._tokenizer, text, len(ids))
        return PromptTokens(prompt, ids, spans)


def _placed(error: CoeError, prompt: Prompt) -> CoeError:
    """The same error, with the prompt in its message."""
    error.args = (f"{prompt.name}: {error}",)
    return error
