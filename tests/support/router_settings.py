"""Settings that the tests of all router kinds need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REQUIRED: Mapping[str, Mapping[str, Any]] = {"fixed": {"expert": "law-expert"}}
"""kind -> the settings that have no default, for the experts of `planted_table`."""
