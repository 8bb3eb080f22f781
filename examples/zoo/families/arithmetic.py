"""One-step arithmetic stories -> the sum that solves them."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Final

from examples.zoo.families.base import Draw, Family, Row, lines, words

_STORIES: Final = MappingProxyType(
    {
        "+": lines("""
            {n} has {a} {x} and buys {b} more. How many {x} does {n} have now?
            There are {a} {x} on the shelf. {n} puts {b} more there. How many are on the shelf?
            {n} found {a} {x} on Monday and {b} on Tuesday. How many in all?
            A box holds {a} {x} and a bag holds {b}. How many {x} are there altogether?
            {n} had {a} {x} and then got {b} as a present. What is the total?
            {n} picks {a} {x} before lunch and {b} after lunch. How many {x} were picked?
            {b} new {x} join the {a} that were there. How many {x} is that?
            {n} adds {b} {x} to a pile of {a}. How big is the pile?
            Yesterday {a} {x} were delivered, and today another {b}. How many came in?
            To the {a} {x} that {n} owned, {b} were added. How many {x} is that?
            One room has {a} {x}, the other has {b}. What do they come to together?
            {n} collected {a} {x}, a friend collected {b}. How many did they collect together?
            With {a} {x} in the drawer and {b} on the desk, how many {x} does {n} have?
            {n} counted {a} {x}, and a friend counted {b} others. How many did the two count?
            A kitchen had {a} {x}. {n} brought {b} extra. How many {x} are there now?
            ---
            {n} starts the day with {a} {x} and is handed {b} more. How many {x} is that altogether?
            A truck carries {a} {x}, and {b} more are loaded. How many {x} is it carrying?
            {n} keeps {a} {x} at home and {b} at work. How many {x} does {n} keep?
            In spring {n} made {a} {x}, in summer another {b}. How many were made?
            The jar already has {a} {x} in it. {n} drops in {b} more. How many {x} are inside?
        """),
        "-": lines("""
            {n} had {a} {x} and gave {b} away. How many {x} are left?
            Of {a} {x}, {n} lost {b}. How many remain?
            {n} ate {b} of the {a} {x}. How many are left?
            {n} sold {b} of the {a} {x}. How many are still there?
            {n} baked {a} {x} and the guests ate {b}. What is left?
            There were {a} {x} in the box until {n} took {b} out. How many stayed in the box?
            {b} of the {a} {x} were stolen. How many were not?
            A shop had {a} {x}, then {b} were sold. How many {x} does it still have?
            {b} out of {a} {x} got broken. How many are whole?
            After {n} used up {b} of the {a} {x}, how many were still there?
            From a pile of {a} {x}, {b} were thrown away. How many are left over?
            {n} needs {a} {x} and has {b} of them. How many are missing?
            {n} burned {b} out of {a} {x}. How many are good?
            {n} dropped {b} of {a} {x} on the way. How many arrived?
            {n} owned {a} {x} and gave a friend {b} of them. How many does {n} still own?
            ---
            {n} carried {a} {x} home, but {b} fell out of the bag. How many {x} got home?
            There are {a} {x} for sale and {b} find a buyer. How many are unsold?
            {n} lends {b} of {a} {x} to a neighbour. How many {x} does {n} keep?
            The cupboard held {a} {x}. Since then {b} have gone. How many {x} does it hold today?
            Out of {a} {x}, {n} has already used {b}. How many can still be used?
        """),
        "*": lines("""
            {n} buys {a} boxes with {b} {x} each. How many {x} is that?
            There are {a} rows of {b} {x}. How many {x} are there?
            Each of {a} children brings {b} {x}. How many {x} do they bring?
            {n} packs {b} {x} into each of {a} bags. How many {x} are packed?
            {a} tables have {b} {x} each. What is the number of {x}?
            Every day {n} makes {b} {x}. How many {x} are made in {a} days?
            {a} shelves carry {b} {x} apiece. How many {x} is that in total?
            On each of {a} pages {n} draws {b} {x}. How many drawings of {x} are there?
            {n} fills {a} trays, {b} {x} to a tray. How many {x} are used?
            Each of the {a} shifts needs {b} {x}. How many {x} are needed in all?
            {n} gives {b} {x} to each of {a} friends. How many {x} are given?
            {a} packs hold {b} {x} each. How many {x} do they hold?
            With {b} {x} a week, how many {x} does {n} need for {a} weeks?
            There are {b} {x} in every basket, and {a} baskets. How many {x} are there?
            {a} teams get {b} {x} each from {n}. How many {x} is that?
            ---
            {n} orders {a} crates, and every crate contains {b} {x}. How many {x} are ordered?
            A wall has {a} hooks with {b} {x} on each hook. How many {x} hang there?
            {a} visitors each leave {b} {x} behind. How many {x} are left behind?
            {n} works {a} hours and sorts {b} {x} an hour. How many {x} get sorted?
            If one bundle is {b} {x}, how many {x} are {a} bundles?
        """),
    }
)
_NAMES = words("""
    Tom Anna Ben Lucy Max Emma Sam Clara Jack Mia Leo Nina Paul Rosa Tim Julia Omar Kate Luke Sofia Ivan Ruth
    Adam Lily Noah Grace Carlos Jane Oscar Amy Felix Ella Hugo Alice Victor Zoe David Maria Peter Laura
    ---
    Oliver Hannah Simon Greta Marco Irene Dennis Fiona Walter Elena Owen Bella
""")
_THINGS = words("""
    apples books coins pens cards stamps shells eggs toys balls cups plates flowers stickers marbles cookies
    pencils buttons oranges candles bottles chairs letters keys photos stones leaves tickets hats socks lemons
    spoons boxes beads nuts pears magnets ribbons posters muffins
    ---
    kites jars plums lamps tulips badges peaches bricks scarves puzzles walnuts ropes
""")
_OPERATIONS: Final[MappingProxyType[str, Callable[[int, int], int]]] = MappingProxyType(
    {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
)


def _make(draw: Draw) -> Row:
    operation = draw.rng.choice(tuple(_STORIES))
    if operation == "*":
        a, b = draw.rng.randrange(2, 10), draw.rng.randrange(2, 10)
    else:
        a, b = draw.rng.randrange(11, 60), draw.rng.randrange(2, 10)
    story = draw.pick(_STORIES[operation]).format(n=draw.pick(_NAMES), x=draw.pick(_THINGS), a=a, b=b)
    result = str(_OPERATIONS[operation](a, b))
    return Row(story, result, completion=f"{a} {operation} {b} = {result}")


MATH = Family(
    name="math",
    about="one-step arithmetic stories, to the sum that solves them",
    grader="number",
    max_tokens=20,
    make=_make,
    pools={
        "names": _NAMES,
        "things": _THINGS,
        **{f"stories_{sign}": pool for sign, pool in _STORIES.items()},
    },
)
