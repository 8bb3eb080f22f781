"""A quantity asked for in another unit."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from examples.zoo.families.base import Draw, Family, Pool, Row, lines, phrases

_TEMPLATES = lines("""
    The {x} is {q}. How many {u} is that?
    My {x} says {q}, but I need it in {u}
    how many {u} are there in {q}?
    The label of the {x} shows {q}, what's that in {u}?
    {q} for the {x}, in {u} please
    Can you give me {q} in {u}?
    We measured the {x} at {q}. Tell me in {u}.
    The recipe sheet for the {x} wants {u}, and I have {q}
    what is {q} expressed in {u}
    The {x} comes to {q}; write it in {u}.
    Turn {q} into {u} for the {x} form.
    I was told {q} for the {x}. That is how many {u}?
    Express the {q} of the {x} in {u}
    If the {x} takes {q}, how much is it in {u}?
    The {x} was listed with {q} and our sheet only takes {u}. What do I write?
    For the {x} we noted {q}. Now I need {u}.
    {q} equals how many {u}?
    Change {q} to {u}
    Our {x} adds up to {q}. Could you say it in {u}?
    The sign by the {x} reads {q}. In {u} it would be what?
    ---
    I have {q} written down for the {x}. What is it in {u}?
    convert {q} into {u}
    How would I write {q} if only {u} are allowed?
    The supplier gave the {x} as {q}; we work in {u}.
    Someone told me the {x} is {q}. Make that {u}, please.
    For the {x}, what do {q} come to in {u}?
""")
_THINGS = phrases("""
    road; bag of rice; shelf; river; tank; rope; parcel; fence; trail; jar; cable; crate; wall; bucket; path;
    sack; plank; bottle; tunnel; box; pipe; barrel; bridge; suitcase; track; pool; beam; kettle; lane; bundle
    ---
    ladder; drum; hose; vat; basket; corridor; hedge; carton; wire; canister; trench; trunk
""")
_FACTORS: Final = MappingProxyType(
    {
        ("km", "metres"): 1000,
        ("kg", "grams"): 1000,
        ("litres", "millilitres"): 1000,
        ("metres", "centimetres"): 100,
        ("cm", "millimetres"): 10,
        ("tonnes", "kilograms"): 1000,
    }
)  # a closed class: all splits need all of them
_NUMBERS = tuple(str(1 + 37 * i % 99) for i in range(99))  # 1 to 99, so mixed that each split has every kind of number
WHOLES = Pool(_NUMBERS, fresh=_NUMBERS[4::5])  # FRESH has the numbers of TEST: there are no others of two digits


def quantity(draw: Draw) -> tuple[str, str, str]:
    """A quantity as it is written, its value in the smaller unit, and that unit."""
    (source, target), factor = draw.rng.choice(tuple(_FACTORS.items()))
    whole, tenths = int(draw.pick(WHOLES)), draw.rng.choice((0, 0, draw.rng.randrange(1, 10)))
    written = f"{whole}.{tenths} {source}" if tenths else f"{whole} {source}"
    return written, str((10 * whole + tenths) * factor // 10), target


def _make(draw: Draw) -> Row:
    written, value, unit = quantity(draw)
    prompt = draw.pick(_TEMPLATES).format(x=draw.pick(_THINGS), q=written, u=unit)
    return Row(prompt[0].upper() + prompt[1:], value, completion=f"{written} = {value} {unit}")


UNITS = Family(
    name="units",
    about="a metric quantity, in a smaller metric unit",
    grader="number",
    max_tokens=24,
    make=_make,
    pools={"templates": _TEMPLATES, "things": _THINGS, "wholes": WHOLES},
)
