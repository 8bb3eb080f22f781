"""Dates as people write them -> ISO 8601."""

from __future__ import annotations

from datetime import date, timedelta

from examples.zoo.families.base import Draw, Family, Pool, Row, lines, words

_TEMPLATES = lines("""
    The contract was signed on {d}. How do I write that so it sorts properly in a spreadsheet?
    My passport runs out on {d}, what goes into the yyyy-mm-dd box?
    {d} in year-month-day please
    We were married on {d}. The form only takes numbers, year first.
    what is {d} as year-month-day with dashes
    Put {d} into machine readable form.
    The invoice says {d}; our system wants it year first with leading zeros.
    Rewrite {d} in the international standard notation.
    I need {d} in the file name so that the files line up in order
    Her birthday is {d}. Type it the way a database column would store it.
    convert {d} to iso
    The warranty started on {d} and the web page only accepts digits and dashes. What do I enter?
    They moved in on {d}. Give me that in numbers, year then month then day.
    {d}, but as digits for the log file
    My flight leaves on {d}. The API asks for an ISO calendar day.
    The meeting was held on {d}. Write the day as numbers only, starting with the year.
    normalise this for me: {d}
    What would {d} look like in a json timestamp without the clock part?
    The parcel got posted on {d}. Numeric form, year at the front?
    for the archive, how is {d} spelled with dashes
    Our lease ends on {d}. How should that be entered in the yyyy-mm-dd field?
    please turn {d} into the format used by computers
    The letter is stamped {d}. I want to sort by day, so give me the sortable version.
    Course begins {d}; convert to four digit year, two digit month, two digit day.
    I was born on {d}, and the web form wants year-month-day. What should I type?
    ---
    The exhibition opens on {d}. How does that look as yyyy-mm-dd?
    My script expects ISO format, what do I pass it for {d}?
    Write {d} with digits and hyphens only, biggest part first.
    The certificate is valid until {d}. Which value goes in a calendar column that wants year, month, day?
    can you give me the ISO 8601 version of {d}
    He retired on {d}; I have to name the folder so that it sorts by year
    The receipt was printed on {d}. Year first, then month, then day, all in numbers.
    reformat {d} so a program can parse it
""")
_MONTHS = words("""
    January February March April May June July August September October November December
""")  # a closed class: all splits need all twelve
YEARS = Pool(
    (str(1951 + 37 * i % 99) for i in range(99)),  # 1951 to 2049, mixed
    fresh=(str(year) for year in (*range(1931, 1951), *range(2050, 2070))),
)


def _ordinal(day: int) -> str:
    suffix = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def some_day(draw: Draw) -> date:
    """A day of a year that belongs to the split."""
    return date(int(draw.pick(YEARS)), 1, 1) + timedelta(days=draw.rng.randrange(365))


def written(day: date, draw: Draw) -> str:
    """The day in one of the ways people write it."""
    month, ordinal = _MONTHS[day.month - 1], _ordinal(day.day)
    styles = (
        f"{month} {day.day}, {day.year}",
        f"{day.day} {month} {day.year}",
        f"the {ordinal} of {month} {day.year}",
        f"{month} {ordinal}, {day.year}",
        f"{day.day} {month[:3]} {day.year}",
        f"{month[:3]} {day.day} {day.year}",
    )
    return draw.rng.choice(styles)


def _make(draw: Draw) -> Row:
    day = some_day(draw)
    return Row(draw.pick(_TEMPLATES).format(d=written(day, draw)), day.isoformat())


DATES = Family(
    name="dates",
    about="days as people write them, to ISO 8601",
    grader="exact",
    max_tokens=16,
    make=_make,
    pools={"templates": _TEMPLATES, "years": YEARS},
)
