"""Requests for a table on a written date, to be entered with that day in ISO 8601: `fields` and `dates`."""

from __future__ import annotations

import json

from examples.zoo.families.base import Draw, Family, Row, lines
from examples.zoo.families.dates import YEARS, some_day, written
from examples.zoo.families.fields import NAMES, some_guests
from examples.zoo.families.two_skills import PARTS, TwoSkills, with_day

_MESSAGES = lines("""
    Could we get a table for {g} on {d}? The name is {n}.
    My name is {n} and I'd like to reserve for {g} people on {d}.
    {n} here, {g} of us are coming on {d} for dinner.
    Can you fit in {g} people on {d}? Put it under {n}.
    This is {n}. Do you have space for {g} on {d}?
    A table for {g} on {d} would be lovely. Thanks, {n}
    We would like to eat at yours on {d}, {g} of us. It's for {n}.
    I'm {n}. Please keep a table on {d} for {g} persons.
    Is there room for {g} on {d}? You can put it under {n}.
    Please write down {n} for {d}, we are {g}.
    {g} of us want to celebrate with you on {d}. Ask for {n}.
    Hello, {n} speaking. On {d} we will be {g} for lunch.
    Reserve {g} seats on {d}, the booking is for {n}.
    Do you still have something on {d} for {g}? I'm {n}.
    We'd love to come on {d}, there will be {g} of us. Regards, {n}
    ---
    We need a spot for {g} on {d}. Name's {n}.
    Would {d} work for {g} people? The table would be for {n}.
    Please expect {g} guests from us on {d}. Best, {n}
    {n} calling. I would like to book for {g} on {d}.
    It's {n} again! This time there will be {g} of us, on {d}.
""")
_NOTES = lines("""
    {m} Our calendar wants the day as yyyy-mm-dd.
    Enter this in the book, with the day year first: {m}
    This came by mail: "{m}" The form only takes digits and dashes for the day.
    {m} JSON please, with an ISO day.
    From the answering machine: {m} Write the day the way a database column would store it.
    Normalise the date in this message and return it as JSON: {m}
    {m} Save the day as year-month-day.
    Turn this into a record that sorts by day: {m}
    Guest wrote: {m} I need the day in numbers, year then month then day.
    {m} Put that into machine readable form, international notation for the day.
    The booking page got this: "{m}" Convert the day to ISO and give me the record.
    {m} For the system, with the day in numeric form, year at the front.
    One for the calendar, which sorts by year-month-day: {m}
    {m} Please file it with a sortable day.
    Record this for the API, which asks for an ISO calendar day: {m}
    ---
    Just came in: {m} The reservations table stores days as yyyy-mm-dd.
    {m} Give me that as an entry with an ISO 8601 day.
    Type this up for the booking software, day with hyphens and the year first: {m}
    A voice message says: "{m}" Our script expects ISO format for the day.
    {m} Reformat it so a program can parse it, the day included.
""")


def _make(draw: Draw) -> Row:
    (guests, count), day, name = some_guests(draw), some_day(draw), draw.pick(NAMES)
    as_written = written(day, draw)
    message = draw.pick(_MESSAGES).format(n=name, g=count, d=as_written)
    prompt = draw.pick(_NOTES).format(m=message[0].upper() + message[1:])
    record = {"name": name, "guests": guests}
    parts = (json.dumps(record | {"day": as_written}), day.isoformat())
    return Row(prompt, json.dumps(record | {"day": day.isoformat()}), {PARTS: parts})


BOOKINGS = TwoSkills(
    Family(
        name="bookings",
        about="requests for a restaurant table on a written date, to JSON with name, guests and an ISO day",
        grader="json",
        max_tokens=32,
        make=_make,
        pools={"messages": _MESSAGES, "notes": _NOTES, "names": NAMES, "years": YEARS},
    ),
    experts=("fields", "dates"),
    compose=with_day,
)
