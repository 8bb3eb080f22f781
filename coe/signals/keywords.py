"""Keywords: the skills that a chat expert names for a query, after Symbolic-MoE (arXiv 2503.05641).

As in the source the expert is asked five times at temperature 0.7 for the two to five skills, subjects or kinds of
knowledge that a question takes; its answers, in the form "Keywords: a, b, c", are split on commas and folded to lower
case, and what has at most 20 characters and was named more than once is kept.

Ours: the words of the prompt, and the examples before it, as turns of the conversation; the source describes the form,
which small experts do not keep to. A word counts once an answer: small experts repeat themselves, and the source would
keep what a single answer repeats. Marks of markdown around words are dropped, and words without a letter. Words come in
the order of how often they were named. Every sample has a seed of its own (of the query and the number of the sample),
so that a query has the same keywords whenever it is asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from coe.compose.synthesis import without_thoughts
from coe.config import EnginesConfig
from coe.errors import CoeError, ContextLengthExceeded
from coe.signals.background import Ask, BackgroundExpert
from coe.types import GenerateRequest
from registry.digest import identity
from registry.storage import coe_home
from registry.store import Snapshot
from routers.base import Message, Words
from routers.encoders.store import Store

PROMPT: Final = """Name the 2 to 5 core skills, subjects or kinds of knowledge that this question takes, as keywords.
Do not answer it.

Question: {question}"""
EXAMPLES: Final = (
    ("Is a verbal agreement to sell a house binding?", "contract law, property law"),
    (
        "A train covers 180 km in 2.5 hours. How fast is that in metres per second?",
        "arithmetic, unit conversion, physics",
    ),
    ("Why does bread dough rise?", "cooking, chemistry, biology"),
)
"""Turns of the conversation before the question: they show the form, which small experts do not take from words."""
SAMPLES: Final = 5
TEMPERATURE: Final = 0.7
MAX_TOKENS: Final = 48
"""Of an answer. The source allows 4,096; five keywords take fewer than 40."""
SEED: Final = 0
MAX_CHARACTERS: Final = 4000
"""Of a question; what follows is not shown. Fewer where the expert's context holds fewer."""
LEAST_CHARACTERS: Final = 100
"""Of a question: an expert whose context does not hold these has no use."""
LONGEST: Final = 20
"""Characters of a keyword."""
OFTEN: Final = 2
"""Answers that a keyword stands in at least."""

MARK: Final = "Keywords:"
"""Begins the line of an answer that holds them."""

_FORMAT: Final = 1
_MARK = re.compile(r"\bkeywords?\b[\s*_]*[:：](?P<rest>.*)", re.IGNORECASE)
_BULLET = re.compile(r"\s*(?:[-*•]|\d+[.)])\s*")
_AROUND: Final = " \t.*_`\"'<>[]"


class KeywordReader:
    """The keywords that one expert gives; loaded when it is first asked, on a host of its own. Close it after use.

    Args:
        name: a chat expert of the snapshot: a model, an adapter (its base is loaded with it), or a remote one.
        engines: their settings.
    """

    at_once: Final = 32
    """Texts that are read, and stored, together."""

    def __init__(self, name: str, snapshot: Snapshot, engines: EnginesConfig | None = None) -> None:
        self._expert = BackgroundExpert(name, snapshot, engines)
        self._identity = identity(snapshot.get(name), snapshot.experts)

    def read(self, texts: Sequence[str]) -> list[Words]:
        """Of each of n texts.

        Raises:
            CoeError: of the first text whose keywords could not be read: weights, memory, an endpoint.
        """
        found = self.read_each(texts)
        for one in found:
            if isinstance(one, CoeError):
                raise one
        return [one for one in found if not isinstance(one, CoeError)]

    def read_each(self, texts: Sequence[str]) -> list[Words | CoeError]:
        """Of each of n texts, or why they could not be read."""

        async def work(ask: Ask) -> list[Words | CoeError]:
            return list(await asyncio.gather(*(_words_or_error(ask, text) for text in texts)))

        try:
            return self._expert.run(work)
        except CoeError as error:  # nothing could be asked at all
            return [error] * len(texts)

    def store(self) -> Store[Words]:
        """Where keywords are kept, by the expert's digest and all that they depend on."""
        settings = [_FORMAT, PROMPT, EXAMPLES, SAMPLES, TEMPERATURE, MAX_TOKENS, SEED, MAX_CHARACTERS, LONGEST, OFTEN]
        key = json.dumps(["keywords", self._identity, settings])
        path = coe_home() / "signals" / f"{hashlib.sha256(key.encode()).hexdigest()}.sqlite"
        return Store(path, _to_bytes, _from_bytes)

    def close(self) -> None:
        """Unload the expert."""
        self._expert.close()


def parse(answer: str) -> list[str]:
    """The keywords of one answer, as often as they stand there, of whatever length; none where it has no such line.

    Counted are all lines with "Keywords:", and where nothing follows on the line, the lines below it.
    """
    words: list[str] = []
    listing = False
    for line in without_thoughts(answer).splitlines():
        if (mark := _MARK.search(line)) is not None:
            rest = mark["rest"]
            listing = not rest.strip(_AROUND)
        elif listing and line.strip():
            rest = _BULLET.sub("", line, count=1)
        else:
            listing = listing and not words
            continue
        found = (part.strip(_AROUND).lower() for part in rest.split(","))
        words += [word for word in found if any(map(str.isalpha, word))]
    return words


def keep(answers: Iterable[Sequence[str]]) -> Words:
    """The short keywords that stand in more than one answer: those of most answers first, then those first named."""
    counts = Counter(word for words in answers for word in dict.fromkeys(words))  # keeps the order in which they came
    often = [word for word, count in counts.items() if count >= OFTEN and len(word) <= LONGEST]
    return tuple(sorted(often, key=lambda word: -counts[word]))


def request_of(text: str, sample: int, characters: int = MAX_CHARACTERS) -> GenerateRequest:
    """What the expert is asked for one sample."""
    valid = text[:characters].encode("utf-8", "replace").decode("utf-8")  # JSON may carry lone surrogates
    digest = hashlib.sha256(f"{SEED} {sample} {text}".encode("utf-8", "surrogatepass"))
    turns = [
        turn for question, words in EXAMPLES for turn in (_asked(question), Message("assistant", f"{MARK} {words}"))
    ]
    return GenerateRequest(
        messages=(*turns, _asked(valid)),
        max_tokens=MAX_TOKENS,
        temperature=TEMPERATURE,
        seed=int.from_bytes(digest.digest()[:6], "big"),
        stream=False,
    )


def _asked(question: str) -> Message:
    return Message("user", PROMPT.replace("{question}", question))


async def _words_or_error(ask: Ask, text: str) -> Words | CoeError:
    if not text.strip():
        return ()
    answers = await asyncio.gather(*(_answer(ask, text, sample) for sample in range(SAMPLES)), return_exceptions=True)
    for one in answers:
        if isinstance(one, CoeError):
            return one
        if isinstance(one, BaseException):
            raise one
    return keep(parse(one) for one in answers if isinstance(one, str))


async def _answer(ask: Ask, text: str, sample: int) -> str:
    """One sample; where the expert's context does not hold the question, of its beginning."""
    characters = MAX_CHARACTERS
    while True:
        try:
            return await ask(request_of(text, sample, characters))
        except ContextLengthExceeded:
            characters = min(characters, len(text)) // 2
            if characters < LEAST_CHARACTERS:
                raise


def _to_bytes(words: Words) -> bytes:
    return json.dumps(words).encode()


def _from_bytes(data: bytes) -> Words:
    return tuple(json.loads(data))
