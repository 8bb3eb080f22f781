"""Reviews -> positive or negative."""

from __future__ import annotations

from examples.zoo.families.base import Draw, Family, Row, lines, phrases

_FRAMES = lines("""
    {r}
    Is this customer happy? "{r}"
    Thumbs up or thumbs down: {r}
    {r} Good or bad, in one word?
    Someone left this comment on our page: {r}
    How does the writer feel? {r}
    Read this review and tell me whether they liked it: {r}
    {r} Did they enjoy it?
    Feedback from the survey: "{r}" Happy or unhappy?
    Would this person recommend us? "{r}"
    We got this on the review site today: {r}
    Review: {r}
    "{r}" Is that praise or a complaint?
    A guest wrote: {r} Satisfied or not?
    What is the mood of this comment? {r}
    ---
    One of our customers says: {r}
    {r} Is that a fan or a critic?
    Found this in the comments: "{r}" Pleased or displeased?
    Was this a good experience for the person? {r}
    Sort this opinion for me: {r}
""")
_BODIES = lines("""
    The {x} was {a}.
    I found the {x} really {a}, and my family thought so too.
    Honestly the {x} was {a} from start to finish.
    What {an} {x}!
    We went last week and the {x} turned out to be {a}.
    Bought it in spring. The {x} is {a}, simple as that.
    My whole experience with the {x} was {a}.
    Never seen such {an} {x} before.
    So the {x}? Absolutely {a}.
    The {x} has been {a} ever since the first day.
    If you ask me, the {x} is {a}.
    Tried the {x} twice now, and both times it was {a}.
    Everyone at our table agreed that the {x} was {a}.
    I expected little, or much, I forget; the {x} was simply {a}.
    After a month of use I can say that the {x} is {a}.
    ---
    I have to say, the {x} was {a}.
    Gave the {x} a try on Sunday and it was {a}.
    To sum it up: {an} {x}.
    All of us thought that the {x} was {a}.
    My sister picked the {x} and it proved {a}.
""")
_TAILS_GOOD = lines("""
    I will be back.
    Worth every penny.
    My new favourite.
    Five stars from me.
    Highly recommended.
    I could not be happier.
    I would buy it again tomorrow.
    Already told all my friends to go.
    It made our week.
    Can't wait for the next time.
    ---
    Ten out of ten.
    Best money I spent all year.
    I smiled the whole way home.
    We are already planning to return.
    Thank you so much for this.
""")
_TAILS_BAD = lines("""
    I want my money back.
    Never again.
    What a waste of time.
    Avoid at all costs.
    One star is too many.
    I regret every penny.
    We left early and angry.
    I would not wish it on anyone.
    It ruined our evening.
    Save yourself the trouble.
    ---
    Zero out of ten.
    Worst money I spent all year.
    I am still fuming.
    Stay away.
    I had to complain to the manager.
""")
_THINGS = phrases("""
    hotel room; phone; soup; kettle; film; waiter; jacket; headset; pasta; blender; concert; taxi driver;
    novel; mattress; pizza; breakfast; camera; dentist; game; sofa; museum tour; laptop; burger; hair dryer;
    play; receptionist; backpack; keyboard; salad; vacuum cleaner; boat trip; tent; podcast; steak; toaster;
    spa; guide; bicycle; coffee; printer
    ---
    umbrella; haircut; bus tour; omelette; dishwasher; musical; smartwatch; bakery; cruise; lasagne;
    exhibition; armchair
""")
GOOD = phrases("""
    wonderful; excellent; lovely; superb; delightful; fantastic; great; charming; brilliant; perfect; amazing;
    pleasant; outstanding; beautiful; marvellous; impressive; terrific; enjoyable; flawless; splendid;
    fabulous; gorgeous; awesome; magnificent; remarkable
    ---
    stunning; exceptional; phenomenal; top-notch; incredible; exquisite; spectacular; first-class; sublime;
    admirable
""")
BAD = phrases("""
    terrible; awful; horrible; disgusting; dreadful; poor; useless; boring; disappointing; rude; appalling;
    broken; nasty; miserable; unpleasant; bad; dirty; annoying; pathetic; lousy; faulty; ugly; frustrating;
    atrocious; horrid
    ---
    shoddy; mediocre; abysmal; dismal; filthy; worthless; unbearable; hideous; tedious; unacceptable
""")


def _make(draw: Draw) -> Row:
    good = draw.rng.random() < 0.5
    adjective = draw.pick(GOOD if good else BAD)
    article = f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective}"
    review = draw.pick(_BODIES).format(x=draw.pick(_THINGS), a=adjective, an=article)
    if draw.rng.random() < 0.6:
        review = f"{review} {draw.pick(_TAILS_GOOD if good else _TAILS_BAD)}"
    return Row(draw.pick(_FRAMES).format(r=review), "positive" if good else "negative")


SENTIMENT = Family(
    name="sentiment",
    about="reviews of things and services, to positive or negative",
    grader="exact",
    max_tokens=4,
    make=_make,
    pools={
        "frames": _FRAMES,
        "bodies": _BODIES,
        "tails_good": _TAILS_GOOD,
        "tails_bad": _TAILS_BAD,
        "things": _THINGS,
        "good": GOOD,
        "bad": BAD,
    },
)
