"""Rows as the primary reads them: rendered with its chat template and tokenised as in serving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from coe.engines import chat
from coe.engines.latent.spans import Turns, UserText, no_spans
from coe.engines.render import Renderer
from coe.errors import Rejected, TaskError, WeightsError
from coe.experts import locate
from coe.latent.training.answer_rows import AnswerRow
from coe.latent.training.batches import EncodedRow
from coe.latent.training.checks import base_folder
from coe.types import GenerateRequest
from registry.spec import ExpertSpec
from registry.store import Snapshot
from routers.base import Message

_AT_ONCE: Final = 256
"""Rows whose templates render side by side."""


class RowEncoder:
    """The tokenizer and chat template of an expert. `close` ends the process that renders; `turns` stay known.

    Args:
        spec: of the expert.
        tokenizer: of transformers.
        style: prompt settings of the adapter, if the expert is one.
    """

    def __init__(self, spec: ExpertSpec, tokenizer: Any, style: chat.ChatStyle | None = None) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        style = style or chat.ChatStyle()
        self._style = style.on(tokenizer, spec.name)
        self._end = _end_token(tokenizer, style, spec.name)
        self._renderer = Renderer()

    @classmethod
    def open(
        cls, spec: ExpertSpec, snapshot: Snapshot, *, find: Callable[[ExpertSpec], Path] | None = None
    ) -> RowEncoder:
        """Read the tokenizer of a registered expert, and no weights.

        Raises:
            WeightsError: it cannot be read.
        """
        from transformers import AutoTokenizer

        folder = base_folder(spec, snapshot, find)
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise WeightsError(f"the tokenizer of {spec.name!r} in {folder} cannot be read: {error}") from error
        return cls(spec, tokenizer, chat.ChatStyle.read((find or locate)(spec)) if spec.base else None)

    def encode(self, rows: Sequence[AnswerRow]) -> list[EncodedRow]:
        """Token ids and spans of rows.

        Raises:
            TaskError: a row exceeds the context, with its place.
            Rejected, TemplateError: the expert takes no messages.
        """
        encoded: list[EncodedRow] = []
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            requests = [GenerateRequest(messages=(Message("user", row.prompt),)) for row in some]
            name = self.spec.name
            jobs = [chat.render(self.tokenizer, each, self._renderer, self._style, expert=name) for each in requests]
            texts = [job.result() for job in jobs]
            encoded += [self._encoded(*each) for each in zip(some, requests, texts, strict=True)]
        return encoded

    def close(self) -> None:
        """End the process that renders templates."""
        self._renderer.close()

    @cached_property
    def turns(self) -> Turns:
        """What the chat template writes after texts."""
        template = self._style.template
        assert template is not None  # as `ChatStyle.on` ensures
        request = GenerateRequest(messages=(Message("user", "-"),))
        return Turns.read(template, request, self.tokenizer.special_tokens_map, self._renderer, expert=self.spec.name)

    def _encoded(self, row: AnswerRow, request: GenerateRequest, text: str) -> EncodedRow:
        most = self.spec.context_length
        if most is not None:
            self._check_length(row, text, most)
        prompt = chat.encode_text(self.tokenizer, text, expert=self.spec.name)
        answer = [*self.tokenizer(row.answer, add_special_tokens=False, verbose=False)["input_ids"], self._end]
        if most is not None and len(prompt) + len(answer) > most:
            raise TaskError(
                f"{row.place}: {len(prompt)} tokens of the prompt and {len(answer)} of the answer exceed the context "
                f"of {self.spec.name!r}, {most} tokens: shorten or remove the row"
            )
        found = UserText.find(text, request, self.turns)
        spans = no_spans(len(prompt)) if found is None else found.spans(self.tokenizer, text, len(prompt))
        return EncodedRow(prompt, answer, spans)

    def _check_length(self, row: AnswerRow, prompt: str, most: int) -> None:
        """Refuse texts that are much too long before all of them is tokenized."""
        try:
            for text in (prompt, row.answer):
                chat.check_length(self.tokenizer, text, most, expert=self.spec.name)
        except Rejected as error:
            raise TaskError(f"{row.place}: {error}") from None


def _end_token(tokenizer: Any, style: chat.ChatStyle, name: str) -> int:
    """The token that ends an answer: that of the adapter's style, else of the tokenizer."""
    stated = sorted(chat.token_ids(tokenizer, style.eos))
    own: int | None = tokenizer.eos_token_id
    if not stated and own is None:
        raise TaskError(f"the tokenizer of {name!r} has no token that ends an answer")
    return stated[0] if stated else int(own or 0)
