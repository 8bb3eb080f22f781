"""The user turns of a conversation that a router reads, and how much each weighs.

A turn that cannot stand alone takes its subject from the turns before it. With p_t, the probability that turn t cannot
stand alone, the estimate of a conversation is

    T_1 = E_1        T_t = (1 - p_t) E_t + p_t T_{t-1}

where E_t is the router's estimate of turn t alone. So a turn weighs (1 - p_t) times the p of all later turns: weights
decay with age, and sum to 1. A conversation of one user turn is E_1, bit for bit.

Texts to embed (`Query.embeds`) are no conversation: they are read one by one and weigh the same, since one expert
embeds them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from routers.base import Message, Query
from routers.conversation.dependence import log_odds
from routers.conversation.harness import user_words, without_tags

Reads = Literal["last", "conversation"]
"""What a router reads of a conversation: the last user turn, or all recent ones."""
MOST_TURNS: Final = 8
"""Most user turns that are read: the last ones with words."""
MOST_MESSAGES: Final = 64
"""Most user messages among which these are looked for."""
MOST_CHARACTERS: Final = 16_000
"""Most characters that are read of a turn, from its beginning, where there are several."""
MOST_INPUTS: Final = 32
"""Most texts to embed that are read, evenly spaced among all: an encoder takes milliseconds for each."""
WORDS_SCALE: Final = 1.5
"""Factor of the words' log-odds. This and the next two were chosen by `benchmarks/conversations.py tune`."""
OOD_SCALE: Final = 16.0
"""Log-odds added per unit of `Estimate.ood` above OOD_NEUTRAL."""
OOD_NEUTRAL: Final = 0.9


@dataclass(frozen=True, slots=True)
class Turn:
    """A user turn that a router reads.

    Attributes:
        message: its index among the messages of the query.
        text: the user's words.
    """

    message: int
    text: str


@dataclass(frozen=True, slots=True)
class Weighed:
    """A user turn that was read: the index of its message, its share of the estimate, and the probability that it
    stands alone."""

    message: int
    weight: float
    alone: float


def turns_of(query: Query, reads: Reads = "conversation") -> list[Turn]:
    """The user turns of a query that a router reads, the oldest first; the last message alone where there is nothing
    else to read.

    A raw prompt and a query with features are read as they are: features belong to the last user message.
    """
    at = [i for i, message in enumerate(query.messages) if message.role == "user"]
    if not at:
        return [Turn(0, "")]
    if query.embeds:
        return _inputs(query, at)
    last = query.messages[at[-1]].content
    if query.raw or query.features or reads == "last":
        return [Turn(at[-1], last)]
    if len(at) == 1:
        return [Turn(at[-1], without_tags(last) or last)]
    at = at[-MOST_MESSAGES:]
    words = user_words([query.messages[i].content for i in at])
    found = [Turn(i, text[:MOST_CHARACTERS]) for i, text in zip(at, words, strict=True) if text.strip()]
    return found[-MOST_TURNS:] or [Turn(at[-1], last)]


def _inputs(query: Query, at: Sequence[int]) -> list[Turn]:
    """Texts to embed, at the given messages."""
    if len(at) == 1:
        return [Turn(at[0], query.messages[at[0]].content)]
    n = min(len(at), MOST_INPUTS)
    rows = [at[i * len(at) // n] for i in range(n)]
    return [Turn(i, query.messages[i].content[:MOST_CHARACTERS]) for i in rows]


def dependence(texts: Sequence[str], ood: NDArray[np.floating] | None = None) -> list[float]:
    """(n,) probability that each user turn cannot stand alone; a single turn always can.

    Args:
        ood: (n,) how far out of distribution the router finds each turn, in [0, 1]; `None` if the router does not say.
    """
    if len(texts) == 1:
        return [0.0]
    odds = [WORDS_SCALE * log_odds(text) for text in texts]
    if ood is not None:
        odds = [z + OOD_SCALE * (float(value) - OOD_NEUTRAL) for z, value in zip(odds, ood, strict=True)]
    return [0.0, *(1.0 / (1.0 + math.exp(-z)) for z in odds[1:])]


def prefix_weights(p: Sequence[float]) -> list[NDArray[np.float64]]:
    """The weights of the turns of each prefix of a conversation: n arrays of 1 to n elements, each of sum 1.

    Args:
        p: (n,) `dependence`.
    """
    found = [np.ones(1)]
    for depends in p[1:]:
        found.append(np.append(depends * found[-1], 1.0 - depends))
    return found


def main_text(messages: Sequence[Message]) -> str:
    """The words of the user turn that weighs most, by the words alone: the text that a conversation is trained on."""
    turns = turns_of(Query(tuple(messages)))
    return turns[int(prefix_weights(dependence([turn.text for turn in turns]))[-1].argmax())].text
