"""Messages to token ids: with the adapter's chat template, else the base's, and exactly one beginning-of-text token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from coe.engines.render import Renderer
from coe.errors import Rejected, TemplateError, WeightsError
from coe.types import GenerateRequest
from registry.errors import SourceError
from registry.headers import check_regular, read_json
from routers.base import Message

_MOST_TEMPLATE_BYTES: Final = 2**22
DEFAULT: Final = "default"
"""Name of the template for ordinary conversations, where a model has several."""


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
        """Read `chat_template.jinja`, `additional_chat_templates` and `tokenizer_config.json`, all optional.

        Raises:
            WeightsError: a file cannot be read, or there are named templates and none is named `default`.
        """
        file = folder / "tokenizer_config.json"
        try:
            config = read_json(file) if file.exists() else {}
            template = _read_template(folder) or _default_template(config.get("chat_template"), str(folder))
        except (SourceError, OSError, ValueError) as error:
            raise WeightsError(
                f"the chat template or tokenizer_config.json in {folder} cannot be read: {error}"
            ) from error
        eos = config.get("eos_token")
        text = eos.get("content") if isinstance(eos, dict) else eos
        return cls(template, (text,) if isinstance(text, str) else ())


def _read_template(folder: Path) -> str | None:
    """The template in a file of its own, as transformers saves it; the others are for tools, retrieval and so on."""
    for file in (folder / "additional_chat_templates" / f"{DEFAULT}.jinja", folder / "chat_template.jinja"):
        if not file.exists():
            continue
        if (size := check_regular(file)) > _MOST_TEMPLATE_BYTES:
            raise ValueError(f"{file.name} has {size:,} bytes; the most is {_MOST_TEMPLATE_BYTES:,}")
        return file.read_text(encoding="utf-8")
    return None


def _default_template(stated: Any, where: str) -> str | None:
    """The template that `chat_template` states: one text, or the one named `default` of a list or mapping.

    Raises:
        WeightsError: it is something else, or no template is named `default`.
    """
    if stated is None or isinstance(stated, str):
        return stated
    named = stated if isinstance(stated, dict) else {}
    if isinstance(stated, list) and all(isinstance(each, dict) for each in stated):
        named = {str(each.get("name")): each.get("template") for each in stated}
    if isinstance(template := named.get(DEFAULT), str):
        return template
    found = f"; it has {', '.join(sorted(map(str, named))[:5])}" if named else ""
    raise WeightsError(
        f"the chat template in {where} must be one Jinja text, or named templates with one named {DEFAULT!r}{found}"
    )


def encode(
    tokenizer: Any, request: GenerateRequest, renderer: Renderer, *, template: str | None = None, expert: str = ""
) -> list[int]:
    """Token ids of a request's prompt. Blocks while a template renders.

    Args:
        tokenizer: a transformers tokenizer.
        template: a chat template instead of the tokenizer's.
        expert: name for error messages.

    Raises:
        Rejected: there is no chat template, it rejects the messages, or the prompt is empty.
        TemplateError: the chat template is broken, or exceeds a limit.
    """
    text = request.prompt
    if text is None:
        text = render(tokenizer, request.messages, renderer, template=template, expert=expert).result()
    return encode_text(tokenizer, text, expert=expert)


def encode_messages(
    tokenizer: Any, messages: Sequence[Message], renderer: Renderer, *, template: str | None = None, expert: str = ""
) -> list[int]:
    """Token ids of a conversation up to the start of the answer; used by training and serving. See `encode`."""
    text = render(tokenizer, messages, renderer, template=template, expert=expert).result()
    return _with_one_bos(tokenizer, _token_ids(tokenizer, text))


def render(
    tokenizer: Any, messages: Sequence[Message], renderer: Renderer, *, template: str | None = None, expert: str = ""
) -> Future[str]:
    """Start to render a conversation up to the start of the answer; see `Renderer.render` and `encode`."""
    if template is None:
        template = template_of(tokenizer, expert)
    variables = {
        "messages": [{"role": m.role, "content": m.content} for m in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        **tokenizer.special_tokens_map,
    }
    return renderer.submit(template, variables, expert=expert)


def template_of(tokenizer: Any, expert: str) -> str:
    """The chat template of a tokenizer.

    Raises:
        Rejected: it has none, so the expert takes plain prompts only.
        TemplateError: it has named templates, and none is named `default`.
    """
    try:
        template = _default_template(tokenizer.chat_template, f"the tokenizer of {expert!r}")
    except WeightsError as error:
        raise TemplateError(str(error)) from None
    if template is None:
        raise Rejected(
            f"{expert!r} has no chat template, so it takes no messages: send a plain prompt (/v1/completions), "
            "or use an adapter that has a chat_template.jinja"
        )
    return template


def encode_text(tokenizer: Any, text: str, *, expert: str = "") -> list[int]:
    """Token ids of a rendered or plain prompt. Raises Rejected if there are none."""
    ids = _with_one_bos(tokenizer, _token_ids(tokenizer, text))
    if not ids:
        raise Rejected(f"the prompt for {expert!r} is empty: it has no tokens")
    return ids


def token_ids(tokenizer: Any, tokens: Sequence[str]) -> frozenset[int]:
    """Ids of the tokens that the tokenizer has; others would map to its "unknown" token."""
    ids = zip(tokens, tokenizer.convert_tokens_to_ids(list(tokens)), strict=True)
    return frozenset(i for token, i in ids if i is not None and tokenizer.convert_ids_to_tokens(i) == token)


def texts_of(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """Texts of single tokens, special ones included."""
    return {i: tokenizer.decode([i], skip_special_tokens=False) for i in ids}


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Texts of the tokens that decoding leaves out."""
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


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
