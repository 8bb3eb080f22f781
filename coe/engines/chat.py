"""Messages to token ids: with the adapter's chat template, else the base's, and exactly one beginning-of-text token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coe.errors import InvalidRequest, WeightsError
from coe.types import GenerateRequest
from routers.base import Message


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """Prompt settings in an adapter's folder; `None` and empty take the base's.

    Attributes:
        template: jinja source of the chat template.
        eos: texts of tokens that end an answer, in addition to the base's.
    """

    template: str | None = None
    eos: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> ChatStyle:
        """Read `chat_template.jinja` and `tokenizer_config.json`, both optional.

        Raises:
            WeightsError: a file cannot be read.
        """
        try:
            config = _read_json(folder / "tokenizer_config.json")
            file = folder / "chat_template.jinja"
            template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"the chat template or tokenizer_config.json in {folder} cannot be read: {error}"
            ) from error
        if template is not None and not isinstance(template, str):
            raise WeightsError(
                f"the chat template in {folder} must be one Jinja text; named templates are not supported"
            )
        eos = config.get("eos_token")
        text = eos.get("content") if isinstance(eos, dict) else eos
        return cls(template, (text,) if isinstance(text, str) else ())


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def encode(tokenizer: Any, request: GenerateRequest, *, template: str | None = None, expert: str = "") -> list[int]:
    """Token ids of a request's prompt.

    Args:
        tokenizer: a transformers tokenizer.
        template: a chat template instead of the tokenizer's.
        expert: name for error messages.

    Raises:
        InvalidRequest: there is no chat template, it rejects the messages, or the prompt is empty.
    """
    if request.prompt is None:
        ids = encode_messages(tokenizer, request.messages, template=template, expert=expert)
    else:
        ids = _with_one_bos(tokenizer, _token_ids(tokenizer, request.prompt))
    if not ids:
        raise InvalidRequest(f"the prompt for {expert!r} is empty: it has no tokens")
    return ids


def encode_messages(
    tokenizer: Any, messages: Sequence[Message], *, template: str | None = None, expert: str = ""
) -> list[int]:
    """Token ids of a conversation up to the start of the answer; used by training and serving."""
    from jinja2 import TemplateError

    if template is None and not tokenizer.chat_template:
        raise InvalidRequest(
            f"{expert!r} has no chat template, so it takes no messages: send a plain prompt (/v1/completions), "
            "or use an adapter that has a chat_template.jinja"
        )
    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        # transformers renders in Jinja's immutable sandbox.
        text = tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise InvalidRequest(f"the chat template of {expert!r} rejects these messages: {error}") from error
    return _with_one_bos(tokenizer, _token_ids(tokenizer, text))


def token_ids(tokenizer: Any, tokens: Sequence[str]) -> frozenset[int]:
    """Ids of the tokens that the tokenizer has; others would map to its "unknown" token."""
    ids = zip(tokens, tokenizer.convert_tokens_to_ids(list(tokens)), strict=True)
    return frozenset(i for token, i in ids if i is not None and tokenizer.convert_ids_to_tokens(i) == token)


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _with_one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    """Templates may write the beginning-of-text token and tokenizers may add it; if either does, there is one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    n_bos = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    if n_bos > 1 or (n_bos == 0 and _adds_bos(tokenizer)):
        return [bos, *ids[n_bos:]]
    return ids


def _adds_bos(tokenizer: Any) -> bool:
    return bool(tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id])
