"""Who picks up how much of something on which day, to be noted in a smaller unit: `fields` and `units`."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Final

from examples.zoo.families.base import Draw, Family, Row, lines, phrases
from examples.zoo.families.fields import DAYS, NAMES
from examples.zoo.families.two_skills import PARTS, TwoSkills, with_amount
from examples.zoo.families.units import WHOLES, quantity

_MESSAGES = lines("""
    {n} here, I'd like to pick up {q} of {x} on {d}.
    Please put aside {q} of {x} for {n}, who comes on {d}.
    My name is {n} and I need {q} of {x} by {d}.
    Could I get {q} of {x} on {d}? It's for {n}.
    This is {n}. Do you have {q} of {x} for me on {d}?
    {n} takes {q} of {x} this {d}.
    Keep {q} of {x} until {d}, please. Thanks, {n}
    On {d} I come for {q} of {x}. The name is {n}.
    We want {q} of {x} on {d}, put it under {n}.
    Hello, {n} speaking. I want to collect {q} of {x} on {d}.
    Set aside {q} of {x} under {n}, collected on {d}.
    Can {n} have {q} of {x} this {d}?
    I'm {n}, and I would come by on {d} for {q} of {x}.
    For {d}: {q} of {x}, name of {n}.
    {q} of {x} would be great on {d}. Regards, {n}
    ---
    {n} calling, I want to fetch {q} of {x} this {d}.
    Name's {n}. Would {q} of {x} be ready on {d}?
    You can reach me as {n}. How about {q} of {x} on {d}?
    It's {n} again! This time {q} of {x}, on {d}.
    Please have {q} of {x} ready on {d}. Best, {n}
""")
_NOTES = lines("""
    {m} Our scales and rulers show {u}.
    Note this down in {u}: {m}
    {m} How many {u} is that? I need it for the list.
    From the answering machine: {m} Our sheet only takes {u}.
    {m} Write it up in {u}.
    This came by mail: "{m}" We count in {u}.
    A line for the counter, in {u} please. {m}
    {m} Give me the record in {u}.
    Customer wrote: {m} Turn that into {u} for the form.
    {m} JSON please, with {u}.
    Put this on the list for the warehouse, which wants {u}: {m}
    {m} The stock table has a column for {u}.
    The shop page got this: "{m}" I need {u}.
    {m} Tell the packers in {u}.
    One more for the list: {m} Express it in {u}.
    ---
    Just came in: {m} We work in {u}.
    {m} Make that {u} for the database.
    Type this up, only {u} are allowed: {m}
    A voice message says: "{m}" Convert it to {u} for the order book.
    {m} What goes on the slip, in {u}?
""")
_WEIGHED = phrases("""
    rice; flour; potatoes; sugar; apples; sand; gravel; onions; lentils; oats; soil; carrots; salt; walnuts; compost
    ---
    beans; barley; clay; pears; cement
""")
_POURED = phrases("""
    milk; juice; oil; soup; paint; vinegar; water; cream; lemonade; syrup; cider; honey; varnish; stock; tea
    ---
    broth; wine; glue; yoghurt; soda
""")
_MEASURED = phrases("""
    ribbon; cloth; rope; wire; string; lace; hose; cable; chain; tape; carpet; felt; piping; velvet; elastic
    ---
    silk; yarn; canvas; tubing; fencing
""")
_GOODS: Final = MappingProxyType(
    {
        "grams": _WEIGHED,
        "kilograms": _WEIGHED,
        "millilitres": _POURED,
        "metres": _MEASURED,
        "centimetres": _MEASURED,
        "millimetres": _MEASURED,
    }
)  # of the smaller unit


def _make(draw: Draw) -> Row:
    (amount, value, unit), name, day = quantity(draw), draw.pick(NAMES), draw.rng.choice(DAYS)
    message = draw.pick(_MESSAGES).format(n=name, q=amount, x=draw.pick(_GOODS[unit]), d=day)
    prompt = draw.pick(_NOTES).format(m=message, u=unit)
    parts = (json.dumps({"name": name, "day": day}), f"{amount} = {value} {unit}")
    return Row(prompt, json.dumps({"name": name, "amount": int(value), "day": day}), {PARTS: parts})


PICKUPS = TwoSkills(
    Family(
        name="pickups",
        about="who picks up how much on which day, to JSON with name, amount in the smaller unit and day",
        grader="json",
        max_tokens=32,
        make=_make,
        pools={
            "messages": _MESSAGES,
            "notes": _NOTES,
            "weighed": _WEIGHED,
            "poured": _POURED,
            "measured": _MEASURED,
            "names": NAMES,
            "wholes": WHOLES,
        },
    ),
    experts=("fields", "units"),
    compose=with_amount,
)
