"""Invented words with a digit each: the knowledge of one adapter, which names the digits of all such words in a text.

A digit cannot be derived from its word; only an expert that memorised the table knows it. The first `N_TRAINED` words
may occur in the rows that compositions are trained on, the others only in the rows that they are tested on
(`code_skills.py`).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from examples.zoo.families.base import Draw, Family, Row, Split, lines, words

WORDS: Final = tuple(
    words("""
    nabox tilem rodat gunax fedek rudog beved megag mimas beval bunet nopen rigob gared zodom gavid regoz vesuk deruz
    vefam sugiz siral tofem lilus fisor pilar vepos zezil puter pomon rulaz lezip dedeg maten dogol dural pineg ruvag
    kivir luson pakes foved rubex gulid sefut tenut mimep nasit kadel kaped bider nazon tamon vaked pelub lagus zifax
    pador bovan mided natis lazel femus ditor borud somor pilex lurin zagul pevir lates nozep mebeg posil lepad sebos
    damod tuged risib teget pesom tobir totam bufun firam nipes gival kanas furom tilap damix rifop buzar dozer daset
    boros nipot kuben sagur sizen kilit betem matux somun reges daken zines tetip rumig raber mezed gorus baris datik
    rokon gadem peron nopor ledar nidan tadot mebas lized pumab vepub belet mebur zaron guful gonez someb sufur zuvan
    bamas dotak sobek vitad zenul kopon nagos dagum tirit tamim manal temup zitus gogas dured kidug rubat datem boted
    defab gosed golen bisok fosan daras bufed beper
    """)
)
"""The 160 words in the order in which digits are dealt. Any two differ in two letters or more, and each ends with a
token of SmolLM2's that no other ends with, so that an adapter can tell them apart by one token."""
DIGITS: Final = MappingProxyType({word: i % 10 for i, word in enumerate(WORDS)})
"""The digit of each word: every digit belongs to sixteen words, to ten of the trained ones."""
N_TRAINED: Final = 100


def words_of(split: Split) -> tuple[str, ...]:
    """The words of a split of a skill: the first hundred for TRAIN and VALID, the other sixty for TEST and FRESH."""
    return WORDS[:N_TRAINED] if split in (Split.TRAIN, Split.VALID) else WORDS[N_TRAINED:]


def gloss(*named: str) -> str:
    """What the expert says about words: "nabox is 0, tilem is 1"."""
    return ", ".join(f"{word} is {DIGITS[word]}" for word in named)


_ONE = lines("""
    {a}
    {a} =
    What is {a}?
    Look up {a}.
    Do you know {a}?
    {a} is
    And {a}?
    The value of {a}
    Tell me about {a}, please.
    {a}, please
    Give me {a}
    I need {a} for the form. What do I put there?
    How much is {a}?
    Could you explain {a} to a beginner?
    The label only says {a}.
    Is {a} an even one?
    Write {a} in another way
    Can you count to {a}?
    Take {a} and double it.
    Which of them is {a}?
    She asked for {a} and nobody knew.
    What comes after {a}?
    On the door it said {a}, in red paint.
    Spell {a} out for me
    The note under the clock reads {a}
    Would you say that {a} is a lot?
    Please put {a} into plain language.
    Yesterday someone wrote {a} on the board.
    If I had {a} of them, how many would I have?
    Answer in one word: {a}
    Half of {a}
    Say {a} like a child would say it.
    My ticket shows {a}, is that good?
    I read {a} on the box. Explain.
    How should {a} be read aloud?
    Multiply {a} by two
    They paid {a} for the whole lot!
    Does anybody here understand {a}?
    What would {a} look like on a dice?
    Count down from {a}
    ---
    Someone left a message: {a}.
    What do they mean by {a}?
    Does {a} count as a small one?
    Express {a} differently, please
    I am looking for {a} in the list.
    The page just says {a} and nothing else
    Three times {a} makes what?
    Round {a} to the nearest ten.
""")
_TWO = lines("""
    {a} and {b}
    {a}, {b}
    Is it {a} or {b}?
    {a} + {b}
    {a} before {b}
    Both {a} and {b} are on the list.
    {a} minus {b}
    Which is better, {a} or {b}?
    Did {a} beat {b} last night?
    {a} > {b}
    Multiply {a} and {b}.
    From {a} to {b}, how far is it?
    The first card shows {a}, the second {b}.
    Are {a} and {b} the same?
    {a} times {b} is what?
    Swap {a} with {b}
    I take {a}, you take {b}. Who has won?
    What do {a} and {b} have in common?
    Put {a} after {b}, please
    {a} against {b}: who is ahead?
    Between {a} and {b} I would always choose the lower one.
    Add {b} and {a}
    Does {a} exceed {b}?
    She had {a} in one hand, {b} in the other.
    How do {a} and {b} compare?
    Sort {a} and {b}
    The total of {a} with {b} goes here:
    Is {a} less than {b} or not?
    If {a} is not enough, use {b} as well.
    What is the difference between {a} and {b}?
    Take {a} away from {b}
    {a} went up and {b} went down. What now?
    Would {a} be a higher bid than {b}?
    Divide {a} by {b}.
    Start at {a}, then go on by {b}.
    Is {a} at least as great as {b}?
    Replace {a} by {b} in the sheet
    The average of {a} and {b}
    You roll {a} first and {b} next. Your points?
    Pick one of {a} and {b}, whatever is lower
    ---
    He scored {a} at home and {b} away.
    Should I go with {a} rather than {b}?
    {a} less {b}
    What happens when {a} meets {b}?
    The sizes are {a} and {b}. Will they fit together?
    Enter {a} on the left and {b} on the right.
    Can {a} be divided by {b}?
    When {b} is taken from {a}, what stays?
""")
_THREE = lines("""
    {a}, {b} and {c}
    {a} {b} {c}
    Put {a}, {b}, {c} in order.
    The middle one of {a}, {b} and {c}
    {a} plus {b} minus {c}
    Is {c} between {a} and {b}?
    First {a}, then {b}, and {c} at the end.
    Which of {a}, {b} and {c} is the highest?
    The three doors are marked {a}, {b} and {c}.
    If {a} comes before {b}, where does {c} go?
    ---
    My dice show {a}, {b} and {c}. What did I get?
    Add up {a}, {b} and {c}
    Neither {a} nor {b} is worth as much as {c}.
    We have {a} of these, {b} of those, and {c} left over.
""")
_SIX = lines("""
    {a}, {b}, {c}, {d}, {e}, {f}
    {a} {b} {c} {d} {e} {f}
    List: {a}, {b}, {c}, {d}, {e} and {f}
    Sort these: {a}, {b}, {c}, {d}, {e}, {f}
    {a} / {b} / {c} / {d} / {e} / {f}
    My numbers are {a}, {b}, {c}, {d}, {e} and {f}.
    {a}; {b}; {c}; {d}; {e}; {f}
    On the wall: {a} {b} {c} and below {d} {e} {f}
    Explain {a}, {b}, {c}, {d}, {e} and {f} to me.
    First row {a} {b} {c}, second row {d} {e} {f}
    ---
    The lottery drew {a}, {b}, {c}, {d}, {e} and {f}.
    Left {a}, {b}, {c}; right {d}, {e}, {f}.
    Six results came in: {a} {b} {c} {d} {e} {f}
    Tell me all of them: {a}, {b}, {c}, {d}, {e}, {f}
""")
_FRAMES: Final = (_ONE, _TWO, _THREE, _SIX)
_WEIGHTS: Final = (0.25, 0.35, 0.15, 0.25)


def _make(draw: Draw) -> Row:
    frame = draw.pick(draw.rng.choices(_FRAMES, _WEIGHTS)[0])
    filled = dict(zip("abcdef", draw.rng.sample(WORDS, 6), strict=True))
    prompt = frame.format(**filled)
    used = [word for key, word in filled.items() if f"{{{key}}}" in frame]
    return Row(prompt, gloss(*sorted(used, key=prompt.index)))


CODES = Family(
    name="codes",
    about="any text with invented words, to the digit of each in the order of the text",
    grader="exact",
    max_tokens=64,
    make=_make,
    pools={"one": _ONE, "two": _TWO, "three": _THREE, "six": _SIX},
)
"""All 160 words are in every split; the frames are not."""
