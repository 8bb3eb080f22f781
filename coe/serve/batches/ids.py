"""Ids of files and batches: a prefix and 24 hexadecimal digits, so that an id is always a safe file name."""

from __future__ import annotations

import hashlib
import re
import secrets

_ID = re.compile(r"(?P<kind>file-|batch_)[0-9a-f]{24}")


def new_batch_id() -> str:
    """A random id."""
    return f"batch_{secrets.token_hex(12)}"


def result_id(batch_id: str, name: str) -> str:
    """The id of a result file of a batch: the same each time, so that a repeated attempt adds no second file."""
    return "file-" + hashlib.sha256(f"{batch_id}:{name}".encode()).hexdigest()[:24]


def is_id(kind: str, text: str) -> bool:
    """Whether a text is the id of a `file` or a `batch`."""
    found = _ID.fullmatch(text)
    return found is not None and found["kind"][:-1] == kind
