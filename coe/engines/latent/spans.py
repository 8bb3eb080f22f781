"""Which characters of the user's text each token of a rendered prompt stands for, and what templates write after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coe.engines.conversation import template_choices, template_variables
from coe.engines.render import Renderer
from coe.errors import TemplateError
from coe.types import GenerateRequest
from routers.base import Message

_QUESTION: Final = "user text 5d1c"  # no template has it
_ANSWER: Final = "answer text 5d1c"


@dataclass(frozen=True, slots=True)
class Turns:
    """What a chat template writes after texts of a conversation.

    Attributes:
        after_user: after the last user message, up to the answer.
        after_answer: after an answer, if another answer follows at once: the end of its turn and the start of another.
    """

    after_user: str
    after_answer: str

    @classmethod
    def read(
        cls,
        template: str,
        request: GenerateRequest,
        special_tokens: Mapping[str, Any],
        renderer: Renderer,
        *,
        expert: str,
    ) -> Turns:
        """Render the template on a conversation of known texts. Blocks meanwhile.

        Args:
            request: with the variables that the caller sets; its messages and tools are not used.
            special_tokens: name -> text, such as `bos_token`.
            expert: name for error messages.

        Raises:
            TemplateError: the template writes the texts of a conversation in another form, or exceeds a limit.
            Rejected: it takes no conversation of a question and an answer.
        """
        question, answer = Message("user", _QUESTION), Message("assistant", _ANSWER)
        pairs = [((question,), True), ((question,), False), ((question, answer), False)]
        jobs = []
        for messages, opened in pairs:
            plain = GenerateRequest(messages=messages, template_kwargs=template_choices(request))
            variables = template_variables(plain, special_tokens) | {"add_generation_prompt": opened}
            jobs.append(renderer.submit(template, variables, expert=expert))
        asked, closed, answered = (job.result() for job in jobs)
        after_user, unopened = _after(asked, _QUESTION, expert), _after(closed, _QUESTION, expert)
        opening = after_user.removeprefix(unopened) or after_user  # templates of Mistral open no turn
        return cls(after_user, _after(answered, _ANSWER, expert) + opening)


def _after(text: str, part: str, expert: str) -> str:
    _, found, after = text.rpartition(part)
    if not found:
        raise TemplateError(f"the chat template of {expert!r} does not write the text of a message as it is")
    return after


@dataclass(frozen=True, slots=True)
class UserText:
    """Where a rendered prompt holds the user's text: characters [start, end) of the prompt.

    shift: characters of the user's text before `start`, which the template has stripped.
    """

    start: int
    end: int
    shift: int = 0

    @classmethod
    def find(cls, prompt: str, request: GenerateRequest, turns: Turns | None = None) -> UserText | None:
        """The last user message of a request in its rendered prompt, or the whole of a plain prompt.

        Args:
            turns: of the template; without it, the last place that has the text.

        Returns:
            `None` if the template does not write the text as it is.
        """
        if request.prompt is not None:
            return cls(0, len(prompt)) if prompt else None
        text = next((m.content for m in reversed(request.messages) if m.role == "user"), "")
        known = turns is not None and prompt.endswith(turns.after_user)
        end = len(prompt) - len(turns.after_user) if turns is not None and known else len(prompt)
        for part in (text, text.strip()):
            if part and (start := prompt.rfind(part, 0, end)) >= 0:
                return cls(start, start + len(part), text.index(part))
        return None

    def spans(self, tokenizer: Any, prompt: str, n_tokens: int) -> NDArray[np.int32]:
        """Characters [start, end) of the user's text that each token stands for: (n_tokens, 2), -1 for none.

        Tokens of the template have none, nor has a beginning-of-text token. All tokens that share a character, such as
        the bytes of an emoji, have that character.

        Args:
            tokenizer: a fast tokenizer of transformers; another one states no places, and no token has a span.
            n_tokens: of the prompt, a beginning-of-text token that was added or removed in front included.
        """
        spans = no_spans(n_tokens)
        if not tokenizer.is_fast:
            return spans
        found = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)[-n_tokens:]
        starts, ends = offsets[:, 0].clip(min=self.start), offsets[:, 1].clip(max=self.end)
        inside = starts < ends
        own = np.stack([starts, ends], axis=1)[inside] - self.start + self.shift
        spans[n_tokens - len(offsets) :][inside] = own
        return spans


def no_spans(n_tokens: int) -> NDArray[np.int32]:
    """The spans (n_tokens, 2) of tokens that stand for no character of the user's text."""
    return np.full((n_tokens, 2), -1, np.int32)
