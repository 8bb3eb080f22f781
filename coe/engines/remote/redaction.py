"""Removes secrets from what endpoints say: an endpoint may echo the key or our headers in its errors."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final
from urllib.parse import quote

from coe.seam import one_line
from registry.errors import without_userinfo

HIDDEN: Final = "***"
MOST_CHARACTERS: Final = 2000
"""Most characters of an endpoint's message in a log."""
MOST_PUBLIC_CHARACTERS: Final = 200
"""Most characters of an endpoint's message that clients may read."""
_BEARER: Final = re.compile(r"\bbearer(\s{1,3}|%20)[\w.~+/=*-]{4,}", re.IGNORECASE)
_HEADERS: Final = re.compile(
    r"(authorization|x-api-key|api[-_]?key|access[-_]?token|cookie)"
    r"([\"']?\s{0,3}[:=]\s{0,3}[\"']?(?:bearer |basic )?)"
    r"[^\s\"',;}]{4,}",
    re.IGNORECASE,
)
_URL: Final = re.compile(r"\bhttps?://\S+", re.IGNORECASE)


def redacted(text: str, secrets: Collection[str]) -> str:
    """The text without these secrets, values of authorization headers, and users of URLs."""
    for secret in secrets:
        for form in {secret, quote(secret, safe="")}:
            text = text.replace(form, HIDDEN)
    text = _BEARER.sub(f"Bearer {HIDDEN}", _HEADERS.sub(rf"\1\2{HIDDEN}", text))
    return without_userinfo(text)


def for_log(text: str, secrets: Collection[str]) -> str:
    """The text as one redacted line."""
    return one_line(redacted(text, secrets), MOST_CHARACTERS)


def for_clients(text: str, secrets: Collection[str]) -> str | None:
    """A short redacted line without URLs; None for a page, and for a text with a secret: it may have parts of more."""
    clean = redacted(text, secrets)
    if HIDDEN in clean or clean.lstrip().startswith("<"):
        return None
    return one_line(_URL.sub("(URL)", clean), MOST_PUBLIC_CHARACTERS) or None
