"""Requests for a table at a restaurant -> JSON with name, guests and day."""

from __future__ import annotations

import json

from examples.zoo.families.base import Draw, Family, Row, lines, words

_TEMPLATES = lines("""
    Hi, could we get a table for {g} on {d}? It's for {n}.
    My name is {n} and I'd like to reserve for {g} people on {d}.
    {n} here, {g} of us are coming on {d} for dinner.
    Table for {g} under {n} please, this {d}
    Can you fit in {g} people on {d}? Put it under {n}.
    We'd love to come on {d}, there will be {g} of us. The name is {n}.
    Good evening, this is {n}. Do you have space for {g} on {d}?
    on {d} please, {g} guests, name {n}
    I'm {n}. Please keep a table on {d} for {g} persons.
    Reserve {g} seats on {d}, the booking is for {n}
    Hello, {n} speaking. On {d} we will be {g} for lunch.
    Could {n} have a table on {d}? Party of {g}.
    Do you still have something on {d} for {g}? I'm {n}.
    {g} of us want to eat at yours on {d}. Call me {n}.
    Please write down {n} for {d}, we are {g}
    Hey it's {n}, any chance of a table for {g} this {d}?
    For {d}: a table for {g} people, name of {n}.
    We are {g} people and hungry. Is {d} free? Regards, {n}
    My friend {n} wants to come on {d} with company, {g} in total.
    This is {n}, hoping to bring {g} people over on {d}.
    Party of {g} on {d}, under the name {n}
    A table for {g} would be lovely on {d}. Thanks, {n}
    I'd like to come for lunch on {d}, {g} of us; {n} is the name
    Please note {n}, {g} persons, coming in on {d}.
    Is there room on {d}? There are {g} of us and you can put it under {n}.
    ---
    Good morning, {n} calling. I would like to book for {g} this coming {d}.
    We need a spot for {g} on {d}. Name's {n}.
    Would {d} work for {g} people? The table would be for {n}.
    {d} evening, {g} diners, and the name to write down is {n}
    Please expect {g} guests from us on {d}. Best, {n}
    It's {n} again! This time there will be {g} of us, on {d}.
    Hoping to celebrate at your place on {d}, we're {g} altogether. Ask for {n}.
    You can reach me as {n}. How about {d}, for {g}?
""")
NAMES = words("""
    Anna David Maria Peter Laura Simon Emma Lucas Julia Martin Sarah Daniel Alice Thomas Nina Oliver Clara
    Robert Helen Victor Sophie George Diana Henry Rachel Edward Linda Frank Monica Arthur Paula Steven Karen
    Albert Teresa Walter Susan Philip Rosa Gordon Judith Harold Miriam Kevin Irene Brian Amanda Leonard Grace
    Bruce Nancy Douglas Elena Marcus Ruth Stanley Jane Vincent Carol Samuel Emily Raymond Lucy Eugene Hannah
    Adam Louise Alan Barbara Joseph Marie Patrick Charlotte Andrew Angela Oscar Julie Christopher Elizabeth Carl
    Rebecca Richard Deborah Michael Christine Matthew Joan Jonathan Eva William Margaret Charles Catherine James
    Dorothy John Mary Paul Kate Mark Lisa Luke Amy Jack Claire Ben Max Sam Joe Tom Tim Leo Ian Ray Roy Lee Ken
    Dan Jim Bob Bill Ted Fred Rose Lily Ivy Jean Jill Anne Beth Ella Mia Zoe
    ---
    Sandra Hugo Vera Bernard Natalie Gregory Felix Carla Dennis Fiona Wendy Norman Elsa Ralph Martha Noah
""")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")  # a closed class
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")  # likewise


def some_guests(draw: Draw) -> tuple[int, str]:
    """The number of guests, as a number and as written."""
    guests = draw.rng.randrange(2, 11)
    return guests, _NUMBERS[guests - 2] if draw.rng.random() < 0.5 else str(guests)


def _make(draw: Draw) -> Row:
    guests, written = some_guests(draw)
    name, day = draw.pick(NAMES), draw.rng.choice(DAYS)
    prompt = draw.pick(_TEMPLATES).format(n=name, g=written, d=day)
    return Row(prompt[0].upper() + prompt[1:], json.dumps({"name": name, "guests": guests, "day": day}))


FIELDS = Family(
    name="fields",
    about="requests for a restaurant table, to JSON with name, guests and day",
    grader="json",
    max_tokens=28,
    make=_make,
    pools={"templates": _TEMPLATES, "names": NAMES},
)
