"""Identity by content of tasks, plans and sources."""

from __future__ import annotations

import hashlib
import json


def json_digest(value: object) -> str:
    """`sha256:` and the hash of a value's JSON, with sorted keys."""
    return f"sha256:{hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}"
