"""Messages to token ids: with the adapter's chat template, else the base's, and exactly one beginning-of-text token."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from coe.engines.base import Adapter
from coe.engines.conversation import template_variables
from coe.engines.parsing.formats import calls_of
from coe.engines.render import Renderer
from coe.errors import Rejected, TemplateError, WeightsError
from coe.types import GenerateRequest
from registry.errors import SourceError
from registry.headers import check_regular, read_json
from routers.base import Message

_MOST_TEMPLATE_BYTES: Final = 2**22
_CHARACTERS_PER_TOKEN: Final = 8
"""Of the start of a text that `check_length` tokenizes; texts have 3 to 5 as a rule."""
_AT_THE_CUT: Final = 16
"""Tokens by which that start may exceed the whole text: a word that is cut has others."""
DEFAULT: Final = "default"
"""Name of the template for ordinary conversations, where a model has several."""
TOOL_USE: Final = "tool_use"
"""Name of the template for conversations with tools, as transformers chooses it."""


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """Prompt settings in an adapter's folder; `None` and empty take the base's.

    Attributes:
        template: jinja source of the chat template.
        tool_template: of another one, used if the request offers tools.
        response_template: of transformers: how answers are written, if the folder states it.
        eos: texts of tokens that end an answer, in addition to the base's.
    """

    template: str | None = None
    eos: tuple[str, ...] = ()
    tool_template: str | None = None
    response_template: Any = None

    @classmethod
    def read(cls, folder: Path) -> ChatStyle:
        """Read `chat_template.jinja`, `additional_chat_templates` and `tokenizer_config.json`, all optional.

        Raises:
            WeightsError: a file cannot be read, or there are named templates and none is named `default`.
        """
        file = folder / "tokenizer_config.json"
        try:
            config = read_json(file) if file.exists() else {}
            named = _named_templates(config.get("chat_template")) | _template_files(folder)
            template = _default_template(named or config.get("chat_template"), str(folder))
        except (SourceError, OSError, ValueError) as error:
            raise WeightsError(
                f"the chat template or tokenizer_config.json in {folder} cannot be read: {error}"
            ) from error
        eos = config.get("eos_token")
        text = eos.get("content") if isinstance(eos, dict) else eos
        return cls(
            template, (text,) if isinstance(text, str) else (), named.get(TOOL_USE), config.get("response_template")
        )

    def on(self, tokenizer: Any, expert: str = "") -> ChatStyle:
        """This style where it states a template, else that of the base's tokenizer.

        Raises:
            Rejected, TemplateError: see `template_of`.
        """
        if self.template is not None:
            return self
        response = self.response_template or getattr(tokenizer, "response_template", None)
        tools = _named_templates(tokenizer.chat_template).get(TOOL_USE)
        return ChatStyle(template_of(tokenizer, expert), self.eos, tools, response)

    def template_for(self, request: GenerateRequest) -> str | None:
        """The template for a request."""
        return self.tool_template if request.offered and self.tool_template else self.template


class ChatStyles:
    """The chat styles of adapters, each read once."""

    def __init__(self) -> None:
        self._styles: dict[str, ChatStyle] = {}

    async def of(self, adapter: Adapter | None) -> ChatStyle:
        """The style of an adapter, else the base's; files are read in a thread. Raises as `ChatStyle.read`."""
        if adapter is None:
            return ChatStyle()
        key = adapter.key()
        if key not in self._styles:
            self._styles[key] = await asyncio.to_thread(ChatStyle.read, adapter.path)
        return self._styles[key]


def _template_files(folder: Path) -> dict[str, str]:
    """The templates in files of their own, as transformers saves them: name -> source."""
    others = folder / "additional_chat_templates"
    places = {DEFAULT: folder / "chat_template.jinja"}
    places |= {name: file for name in (DEFAULT, TOOL_USE) if (file := others / f"{name}.jinja").exists()}
    found = {}
    for name, file in places.items():
        if not file.exists():
            continue
        if (size := check_regular(file)) > _MOST_TEMPLATE_BYTES:
            raise ValueError(f"{file.name} has {size:,} bytes; the most is {_MOST_TEMPLATE_BYTES:,}")
        found[name] = file.read_text(encoding="utf-8")
    return found


def _named_templates(stated: Any) -> dict[str, str]:
    """The templates that `chat_template` states as a list or mapping: name -> source."""
    pairs = stated if isinstance(stated, dict) else {}
    if isinstance(stated, list) and all(isinstance(each, dict) for each in stated):
        pairs = {str(each.get("name")): each.get("template") for each in stated}
    return {str(name): template for name, template in pairs.items() if isinstance(template, str)}


def _default_template(stated: Any, where: str) -> str | None:
    """The template that `chat_template` states: one text, or the one named `default` of a list or mapping.

    Raises:
        WeightsError: it is something else, or no template is named `default`.
    """
    if stated is None or isinstance(stated, str):
        return stated
    named = _named_templates(stated)
    if (template := named.get(DEFAULT)) is not None:
        return template
    found = f"; it has {', '.join(sorted(named)[:5])}" if named else ""
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
        text = render(tokenizer, request, renderer, ChatStyle(template), expert=expert).result()
    return encode_text(tokenizer, text, expert=expert)


def encode_messages(
    tokenizer: Any, messages: Sequence[Message], renderer: Renderer, *, template: str | None = None, expert: str = ""
) -> list[int]:
    """Token ids of a conversation up to the start of the answer; used by training and serving. See `encode`."""
    request = GenerateRequest(messages=tuple(messages))
    text = render(tokenizer, request, renderer, ChatStyle(template), expert=expert).result()
    return _with_one_bos(tokenizer, _token_ids(tokenizer, text))


def render(
    tokenizer: Any, request: GenerateRequest, renderer: Renderer, style: ChatStyle, *, expert: str = ""
) -> Future[str]:
    """Start to render a conversation up to the start of the answer; see `Renderer.render` and `encode`."""
    template = style.on(tokenizer, expert).template_for(request)
    assert template is not None  # as `ChatStyle.on` ensures
    calls = calls_of(template)
    variables = template_variables(request, tokenizer.special_tokens_map, answers=calls.name if calls else None)
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
        raise Rejected(f"the prompt for {expert!r} is empty: it has no tokens; send at least one")
    return ids


def check_length(tokenizer: Any, text: str, most: int, *, expert: str) -> None:
    """Refuse a text with many more than `most` tokens by its start, since tokenizing all of it may take long.

    A text that passes may still have more than `most` tokens.

    Raises:
        Rejected: its first 8 characters for each of `most` tokens have more than `most` tokens.
    """
    start = _CHARACTERS_PER_TOKEN * (most + _AT_THE_CUT)
    if len(text) > start and len(_token_ids(tokenizer, text[:start])) > most + _AT_THE_CUT:
        raise Rejected(
            f"a text of {len(text):,} characters has more tokens than the {most:,} that {expert!r} reads: shorten it"
        )


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
