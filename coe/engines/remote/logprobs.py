"""Log-probabilities in an endpoint's answer: in the form of chat, of completions, and of vLLM's `prompt_logprobs`.

The values are an endpoint's: what is no number becomes LEAST, what is no token is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

from coe.types import TokenLogprob

LEAST: Final = -9999.0
"""The log-probability of what an endpoint states none for, and of impossible tokens; OpenAI and vLLM use it too."""
MOST_TOP: Final = 64
"""Most alternatives of a token that are read."""
_MOST_BYTES: Final = 1024
"""Most bytes of a token."""


def logprobs_of(choice: dict[str, Any], most: int) -> list[TokenLogprob]:
    """The log-probabilities of a choice's tokens.

    Args:
        most: most tokens to read.
    """
    found = choice.get("logprobs")
    if not isinstance(found, dict):
        return []
    if isinstance(content := found.get("content") or found.get("refusal"), list):
        return [_entry(each) for each in content[:most] if isinstance(each, dict) and _is_token(each.get("token"))]
    return list(_of_completion(found, most))


def prompt_logprobs_of(event: dict[str, Any], choice: dict[str, Any], most: int) -> list[TokenLogprob]:
    """The log-probabilities of a prompt, in vLLM's form: for each token, token id -> log-probability, rank and text.

    The token of the prompt is the first one of its mapping.
    """
    found = choice.get("prompt_logprobs") or event.get("prompt_logprobs")
    if not isinstance(found, list):
        return []
    return [
        TokenLogprob("", None) if not isinstance(each, dict) or not each else _ranked(each) for each in found[:most]
    ]


def _entry(stated: dict[str, Any]) -> TokenLogprob:
    top = stated.get("top_logprobs")
    alternatives = [each for each in top[:MOST_TOP] if isinstance(each, dict)] if isinstance(top, list) else []
    return TokenLogprob(
        _clean(stated["token"]),
        _number(stated.get("logprob")),
        _bytes(stated.get("bytes")),
        tuple(
            (_clean(each["token"]), _number(each.get("logprob")), _bytes(each.get("bytes")))
            for each in alternatives
            if _is_token(each.get("token"))
        ),
    )


def _of_completion(found: dict[str, Any], most: int) -> Iterator[TokenLogprob]:
    """The entries of `tokens`, `token_logprobs` and `top_logprobs`; the last two may be null, or hold nulls."""
    tokens, values, tops = (
        value if isinstance(value := found.get(name), list) else []
        for name in ("tokens", "token_logprobs", "top_logprobs")
    )
    for i, token in enumerate(tokens[:most]):
        if not _is_token(token):
            continue
        value = values[i] if i < len(values) else LEAST
        top = tops[i] if i < len(tops) and isinstance(tops[i], dict) else {}
        alternatives = [(_clean(text), _number(stated), None) for text, stated in [*top.items()][:MOST_TOP]]
        alternatives.sort(key=lambda each: -each[1])
        yield TokenLogprob(_clean(token), None if value is None else _number(value), None, tuple(alternatives))


def _ranked(stated: dict[str, Any]) -> TokenLogprob:
    entries = [each if isinstance(each, dict) else {} for each in [*stated.values()][: MOST_TOP + 1]]
    texts = [(_clean(str(each.get("decoded_token") or "")), _number(each.get("logprob")), None) for each in entries]
    return TokenLogprob(texts[0][0], texts[0][1], None, tuple(sorted(texts, key=lambda each: -each[1])))


def _is_token(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_BYTES


def _clean(token: str) -> str:
    """The token without lone surrogates, which no response can carry."""
    return token if token.isascii() else token.encode("utf-8", "replace").decode()


def _number(value: Any) -> float:
    """A log-probability; servers send null, -Infinity, NaN, and a little more than 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return LEAST
    try:
        number = float(value)
    except OverflowError:
        return LEAST
    return min(max(number, LEAST), 0.0) if math.isfinite(number) else LEAST


def _bytes(value: Any) -> bytes | None:
    if not isinstance(value, list) or len(value) > _MOST_BYTES:
        return None
    try:
        return bytes(value)
    except (TypeError, ValueError):
        return None
