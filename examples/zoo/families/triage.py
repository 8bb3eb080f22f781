"""Messages to a shop that praise or complain and want something: the mood and the queue, `sentiment` and `intent`."""

from __future__ import annotations

from examples.zoo.families.base import Draw, Family, Row, lines
from examples.zoo.families.intent import GOODS, QUEUES
from examples.zoo.families.sentiment import BAD, GOOD
from examples.zoo.families.two_skills import PARTS, TwoSkills, side_by_side

_OPINIONS = lines("""
    The advice in your store was {a}.
    My last visit was {a}.
    I find your website {a}.
    The staff on the phone were {a}.
    So far shopping with you has been {a}.
    Your people are {a}.
    What I saw in your shop was {a}.
    The man at the counter was {a} to me.
    If you ask me, your shop is {a}.
    Honestly, your service is {a}.
    All of us think that your new catalogue is {a}.
    My first chat with your team was {a}.
    The help I got last time was {a}.
    The evening in your showroom turned out to be {a}.
    I told my friends that your shop is {a}.
    ---
    I have to say, your shop assistants were {a}.
    The tour of your store on Sunday was {a}.
    To sum it up, your support is {a}.
    My sister and I both find your app {a}.
    The lady who took my call was {a}.
""")
_NOTES = lines("""
    {m}
    Is this customer happy, and who should handle it? {m}
    Mood and queue, please: {m}
    A customer wrote: {m} Thumbs up or down, and which desk?
    {m} Tell me how they feel and where it goes.
    This is in the inbox: "{m}" Praise or complaint, and for whom?
    Sort this, by tone and by topic: {m}
    {m} Do they like us, and what do they want?
    Read this, say whether they are pleased and pass it on: {m}
    "{m}" Satisfied or not, and which team?
    How does the writer feel, and who takes it from here? {m}
    Came through the contact form: {m} Good or bad mood, then the department.
    {m} For the log I need the feeling and the queue.
    Rate the mood and route it: {m}
    We got this today: {m} Happy or unhappy? Whose job is it?
    ---
    One of our customers says: {m} Fan or critic, and where do I send it?
    {m} What is the attitude, and which queue is right?
    Found this in the mail: "{m}" Pleased or displeased, and for which colleagues?
    Label this one with its tone and its destination: {m}
    {m} Was that friendly, and who deals with it?
""")


def _make(draw: Draw) -> Row:
    queue, good = draw.rng.choice(tuple(QUEUES)), draw.rng.random() < 0.5
    wish = draw.pick(QUEUES[queue]).format(x=draw.pick(GOODS))
    opinion = draw.pick(_OPINIONS).format(a=draw.pick(GOOD if good else BAD))
    sentences = [opinion, wish[0].upper() + wish[1:] + ("" if wish[-1] in ".!?" else ".")]
    if draw.rng.random() < 0.3:
        sentences.reverse()
    parts = ("positive" if good else "negative", f"[{queue}]")
    return Row(draw.pick(_NOTES).format(m=" ".join(sentences)), " ".join(parts), {PARTS: parts})


TRIAGE = TwoSkills(
    Family(
        name="triage",
        about="messages to a shop, to their mood and the queue that should handle them",
        grader="exact",
        max_tokens=12,
        make=_make,
        pools={
            "opinions": _OPINIONS,
            "notes": _NOTES,
            "goods": GOODS,
            "good": GOOD,
            "bad": BAD,
            **{f"messages_{name}": pool for name, pool in QUEUES.items()},
        },
    ),
    experts=("sentiment", "intent"),
    compose=side_by_side,
)
