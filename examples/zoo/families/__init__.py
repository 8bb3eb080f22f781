"""The task families of the zoo. Adding one is a file here and a line in the list."""

from __future__ import annotations

from examples.zoo.families.arithmetic import MATH
from examples.zoo.families.base import Draw, Family, Pool, Row, Split
from examples.zoo.families.bookings import BOOKINGS
from examples.zoo.families.code_skills import CODE_ORDER, CODE_SUM, CODE_WORD
from examples.zoo.families.codes import CODES
from examples.zoo.families.dates import DATES
from examples.zoo.families.fields import FIELDS
from examples.zoo.families.intent import INTENT
from examples.zoo.families.pickups import PICKUPS
from examples.zoo.families.sentiment import SENTIMENT
from examples.zoo.families.shell import SHELL
from examples.zoo.families.sql import SQL
from examples.zoo.families.triage import TRIAGE
from examples.zoo.families.two_skills import PARTS, TwoSkills
from examples.zoo.families.units import UNITS

FAMILIES = {family.name: family for family in (SQL, SHELL, FIELDS, DATES, UNITS, MATH, SENTIMENT, INTENT)}
"""The families of the zoo's experts, one each."""
TWO_SKILLS = {pair.family.name: pair for pair in (BOOKINGS, PICKUPS, TRIAGE)}
"""Families that need two experts: no expert is trained on these, and the demo and its router do not use them."""
CODE_SKILLS = {family.name: family for family in (CODE_ORDER, CODE_SUM, CODE_WORD)}
"""Families of knowledge and skill: the adapter `codes`, trained on CODES, knows the words, and no expert the skill."""

__all__ = [
    "CODES",
    "CODE_SKILLS",
    "FAMILIES",
    "PARTS",
    "TWO_SKILLS",
    "Draw",
    "Family",
    "Pool",
    "Row",
    "Split",
    "TwoSkills",
]
