"""The check of an input file before any of its requests is answered.

A line that is no batch request makes the whole batch fail, as OpenAI's does: the file is not what it should be. A
request whose body is wrong fails alone, with the line of its answer in the error file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from coe.batch.rows import CHAT, COMPLETIONS
from coe.errors import InvalidRequest
from coe.policy import AUTO
from coe.serve.http.json_body import parse_json
from registry.spec import RESERVED_PREFIX

ENDPOINTS: Final = (CHAT, COMPLETIONS)
"""Endpoints whose requests a batch answers."""
MOST_ERRORS: Final = 100
"""Errors after which checking stops."""
MOST_ID: Final = 512
"""Most characters of a `custom_id`."""
_FIELDS: Final = frozenset({"custom_id", "method", "url", "body"})
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(slots=True)
class Checked:
    """What was found.

    errors: as OpenAI's `errors.data`; empty: the file is right. models: `auto` and policies that the requests name.
    """

    rows: int = 0
    models: set[str] = field(default_factory=set)
    errors: list[dict[str, Any]] = field(default_factory=list)

    def add(self, line: int | None, code: str, message: str, param: str | None = None) -> None:
        """Add an error."""
        self.errors.append({"code": code, "line": line, "message": message[:500], "param": param})


def check_input(path: Path, endpoint: str, *, max_rows: int, max_line_bytes: int) -> Checked:
    """Check every line of a file, one at a time.

    Args:
        endpoint: that of the batch, and so of each line.
    """
    checked, ids = Checked(), dict[bytes, int]()
    try:
        with path.open("rb") as file:
            for number, line in _lines(file, max_line_bytes):
                if line is not None and not line.strip():
                    continue
                checked.rows += 1
                if checked.rows > max_rows:
                    checked.add(
                        number, "too_many_requests", f"more than {max_rows:,} requests (serve.batches.max_rows)"
                    )
                    break
                _check(checked, ids, number, line, endpoint, max_line_bytes)
                if len(checked.errors) >= MOST_ERRORS:
                    break
    except FileNotFoundError:
        checked.add(None, "file_not_found", "the input file was deleted")
        return checked
    if not checked.rows:
        checked.add(None, "empty_file", "the input file has no requests")
    return checked


def _lines(file: IO[bytes], max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """The lines by number, from 1; None for one that is too long, of which no more is held than that."""
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        whole: bytes | None = line.removeprefix(_BOM) if number == 1 else line
        while len(line) > max_bytes and not line.endswith(b"\n"):
            whole = None
            line = file.readline(max_bytes + 1)
            if not line:
                break
        yield number, whole


def _check(
    checked: Checked, ids: dict[bytes, int], number: int, line: bytes | None, endpoint: str, max_bytes: int
) -> None:
    if line is None:
        checked.add(number, "line_too_long", f"the line has more than {max_bytes:,} bytes (serve.max_body_bytes)")
        return
    try:
        value = parse_json(line)
    except InvalidRequest as error:
        checked.add(number, "invalid_json_line", f"the line is not JSON: {error}")
        return
    if not isinstance(value, dict):
        checked.add(number, "invalid_json_line", "the line is not a JSON object")
        return
    if unknown := sorted(value.keys() - _FIELDS):
        checked.add(number, "unknown_field", f"unknown field {unknown[0][:80]!r}", unknown[0][:80])
    _check_id(checked, ids, number, value.get("custom_id"))
    if value.get("method") != "POST":
        checked.add(number, "invalid_method", "method must be 'POST'", "method")
    if value.get("url") != endpoint:
        checked.add(number, "mismatched_endpoint", f"url must be that of the batch, {endpoint!r}", "url")
    body = value.get("body")
    if not isinstance(body, dict):
        checked.add(number, "invalid_body", "body must be an object with the request", "body")
        return
    model = body.get("model", AUTO)
    if isinstance(model, str) and (model == AUTO or model.startswith(RESERVED_PREFIX)) and len(model) <= MOST_ID:
        checked.models.add(model)


def _check_id(checked: Checked, ids: dict[bytes, int], number: int, custom_id: object) -> None:
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MOST_ID:
        checked.add(number, "invalid_custom_id", f"custom_id must be a text of 1 to {MOST_ID} characters", "custom_id")
        return
    digest = hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
    first = ids.setdefault(digest, number)
    if first != number:
        checked.add(number, "duplicate_custom_id", f"custom_id is that of line {first} already", "custom_id")
