"""Messages to a shop's support desk -> the queue that should handle them."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from examples.zoo.families.base import Draw, Family, Row, lines, phrases

QUEUES: Final = MappingProxyType(
    {
        "delivery": lines("""
            where is my {x}? it should have been here by now
            The tracking page for my {x} has not changed in days.
            When will the {x} I ordered arrive?
            My {x} still hasn't shown up at my door
            The courier says the {x} was handed over, but nobody brought anything to us.
            Has the {x} been shipped yet?
            I am still waiting for the parcel with the {x}
            It has been two weeks and no sign of the {x}. Is it lost in the post?
            How long does it take until the {x} gets to me?
            The driver never rang the bell, so where did the package with my {x} go?
            ---
            The {x} was supposed to be here on Friday and there's still nothing.
            Which day will the {x} be dropped off?
            My neighbours have no parcel either, so where has the {x} ended up?
            Could you check with the courier what is keeping my {x}?
        """),
        "refund": lines("""
            I sent the {x} back and want my money returned to my card
            Please give me my money back for the {x}.
            When do I get reimbursed for the {x} I returned?
            You charged me twice for the {x}, pay one of them back
            I would like my money back, the {x} is not what I wanted.
            The {x} went back last week and nothing has been credited to my account
            How long until the amount for the returned {x} is on my card again?
            I returned the {x}, so where is my money?
            I don't want to keep the {x}, how do I get reimbursed?
            Still no money on my account for the {x} that I sent back to you.
            ---
            You received my {x} back ten days ago. When will I be paid back?
            I'd rather have my money than another {x}, so please pay me back
            The price of the {x} was taken from my card two times, return one payment.
            Has the repayment for the {x} that I mailed back been made yet?
        """),
        "cancel": lines("""
            I changed my mind about the {x}, please stop the order
            Don't send the {x}, I no longer want it.
            How do I call off the order for the {x} before it ships?
            Please cancel the {x} that I ordered this morning
            I ordered the {x} by mistake, can you cancel it?
            Is it too late to withdraw my order of the {x}?
            kindly cancel my purchase of the {x}
            Can I still take back the order of the {x} before it leaves the warehouse?
            I'd like to cancel the {x}, it has not been shipped yet
            The {x} order was an accident, so please do not process it and cancel.
            ---
            I found the {x} cheaper elsewhere, so please drop my order before you pack it.
            Please scrap the order I placed for the {x}, I don't need it any more
            Can the order for the {x} still be stopped? I clicked too fast.
            Just ordered the {x} and already regret it, undo the order please
        """),
        "account": lines("""
            I can't log in to look at my {x} order
            The site says my password is wrong when I try to buy the {x}.
            I forgot my password and want to see the order of my {x}
            Please reset my password, I need to get at the receipt for my {x}.
            My login stopped working right after I bought the {x}
            I am locked out of my profile and cannot see the {x} I bought.
            the reset email for my password never comes and the {x} is in my basket
            How do I change the e-mail I sign in with? It's for the {x} purchase.
            Signing in fails every time I want to check on my {x}
            My username is not recognised since I paid for the {x}, so I can't log in.
            ---
            I want to buy the {x}, but the sign-in page keeps rejecting me.
            It says my profile is blocked, and I only wanted to look up the {x} order
            What do I do if I have lost my password? I need to see when I bought the {x}.
            Since I paid for the {x}, the code you text me for logging in is never accepted.
        """),
        "broken": lines("""
            The {x} came with a crack in it
            My {x} stopped working after one day.
            The {x} I received is damaged
            There is a piece missing from the {x} you sent.
            The {x} does not turn on any more
            My new {x} fell apart in my hands.
            the {x} is defective, it makes a strange noise
            One corner of the {x} is smashed.
            The {x} arrived in pieces
            Something is wrong with the {x}: it is torn and will not close.
            ---
            I unpacked the {x} and it has a big dent.
            After a week of normal use the {x} has given up
            The {x} won't work, no matter what I try.
            A part of the {x} snapped off the first time I touched it.
        """),
        "invoice": lines("""
            Can you send me a bill with VAT for the {x}?
            I need an invoice for the {x} for my tax office.
            Where can I download the receipt for the {x}?
            The invoice for the {x} has the wrong company name on it
            Please e-mail me the bill for the {x} as a pdf.
            my accountant needs an invoice for the {x}
            Could you put our VAT number on the invoice for the {x}?
            The receipt of the {x} is missing, please send it once more.
            There is no bill in the box with the {x}, I need one for my employer
            I have to hand in an invoice for the {x}, so please mail me one with our firm's name.
            ---
            For my expense report I need a proper bill for the {x}.
            The tax rate printed on the bill for the {x} is not right
            Could I get the paperwork with VAT for the {x}, for our bookkeeping?
            Please issue the invoice of the {x} to my company's address.
        """),
    }
)
_GREETINGS = ("Hi, ", "Hello, ", "Hey there. ", "Good morning. ", "Dear team, ", "hi! ", "Hello! ", "Hey, ")
_CLOSINGS = (" Thanks!", " Thank you.", " Please help.", " Cheers", " Best wishes", " thx", " Many thanks.")
GOODS = phrases("""
    blue lamp; coat; desk; headphones; carpet; guitar; kettle; shoes; bike helmet; mirror; tablet; garden
    chair; curtains; drill; watch; school bag; sunglasses; oven; tea set; football; raincoat; bookshelf; fan;
    perfume; saddle; charger; rug; jeans; skates; pillow; monitor; suitcase; wallet; ladder; necklace
    ---
    armchair; toaster; wool scarf; yoga mat; printer; violin; coffee grinder; umbrella; tent; wall clock;
    keyboard; hiking boots
""")


def _make(draw: Draw) -> Row:
    queue = draw.rng.choice(tuple(QUEUES))
    message = draw.pick(QUEUES[queue]).format(x=draw.pick(GOODS))
    if draw.rng.random() < 0.5:
        message = draw.rng.choice(_GREETINGS) + message
    if draw.rng.random() < 0.4:
        message += draw.rng.choice(_CLOSINGS)
    return Row(message, f"[{queue}]")


INTENT = Family(
    name="intent",
    about="messages to a shop's support desk, to one of six queues in brackets",
    grader="exact",
    max_tokens=8,
    make=_make,
    pools={"goods": GOODS, **{f"messages_{name}": pool for name, pool in QUEUES.items()}},
)
