"""Families of two-skill queries: each needs two experts of the zoo, whose combined answers are correct."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from examples.zoo.families.base import Family

PARTS = "parts"
"""The key of `Row.extras` for the expected answers of the two experts, in the order of `TwoSkills.experts`."""
_RESULT = re.compile(r"= (\d+)\b")


@dataclass(frozen=True, slots=True)
class TwoSkills:
    """A family of two-skill queries: no expert of the zoo is trained on them; two experts know a part each.

    Attributes:
        experts: the two of the zoo.
        compose: the correct answer from the two expected answers, in the order of `experts`: a hand-written rule, to
            compare aggregators with. Raises ValueError if an answer does not have the form of its expert.
    """

    family: Family
    experts: tuple[str, str]
    compose: Callable[[str, str], str]


def with_day(record: str, day: str) -> str:
    """A record of `fields` with the day from `dates`."""
    return json.dumps(_record(record, "name", "guests") | {"day": day})


def with_amount(record: str, amount: str) -> str:
    """Name and day of a record of `fields`, and the result from `units`."""
    found = _RESULT.search(amount)
    if found is None:
        raise ValueError(f"no result in {amount!r}")
    given = _record(record, "name", "day")
    return json.dumps({"name": given["name"], "amount": int(found[1]), "day": given["day"]})


def side_by_side(first: str, second: str) -> str:
    """The first answer, then the second."""
    return f"{first} {second}"


def _record(text: str, *keys: str) -> dict[str, object]:
    record = json.loads(text)
    if not isinstance(record, dict) or not set(keys) <= set(record):
        raise ValueError(f"not a record of {', '.join(keys)}: {text!r}")
    return {key: record[key] for key in keys}
