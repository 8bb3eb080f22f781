"""The task families of the zoo. Adding one is a file here and a line in the list."""

from __future__ import annotations

from examples.zoo.families.arithmetic import MATH
from examples.zoo.families.base import Draw, Family, Pool, Row, Split
from examples.zoo.families.bookings import BOOKINGS
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
"""What the experts of the zoo are for, one family each."""
TWO_SKILLS = {pair.family.name: pair for pair in (BOOKINGS, PICKUPS, TRIAGE)}
"""What takes two of them: no expert is trained on these, and neither the demo nor its router knows them."""

__all__ = ["FAMILIES", "PARTS", "TWO_SKILLS", "Draw", "Family", "Pool", "Row", "Split", "TwoSkills"]
