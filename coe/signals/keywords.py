"""Keywords: the skills that a chat expert names for a query, after Symbolic-MoE (arXiv 2503.05641).

As in the paper, the expert is asked five times at temperature 0.7 for the two to five skills, subjects or kinds of
knowledge that a question needs. Its answers, of the form "Keywords: a, b, c", are split on commas and lower-cased;
words of at most 20 characters that occur in more than one answer are kept.

What differs: the wording of the prompt, and examples as turns of the conversation before it; the paper describes the
form, which small experts do not follow. A word counts once per answer: small experts repeat themselves, and the paper
would keep what a single answer repeats. Markdown around words and words without a letter are dropped. Words are ordered
by frequency. Each sample has its own seed (from the query and the sample number), so that a query always has the same
keywords.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from coe.answers.thinking import without_thoughts
from coe.engine_config import EnginesConfig
from coe.errors import CoeError, ContextLengthExceeded
from coe.signals.background import AskText, BackgroundExpert
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
"""Turns of the conversation before the question, which show the form: small experts do not follow a description."""
SAMPLES: Final = 5
TEMPERATURE: Final = 0.7
MAX_TOKENS: Final = 48
"""Of an answer. The paper allows 4,096; five keywords need fewer than 40."""
SEED: Final = 0
MAX_CHARACTERS: Final = 4000
"""Of a question; the rest is not shown. Fewer if the expert's context is shorter."""
LEAST_CHARACTERS: Final = 100
"""Of a question; an expert with a shorter context is an error."""
LONGEST: Final = 20
"""Most characters of a keyword."""
OFTEN: Final = 2
"""Least number of answers that contain a keyword."""

MARK: Final = "Keywords:"
"""Begins the line of an answer that holds them."""

_FORMAT: Final = 1
_MARK = re.compile(r"\bkeywords?\b[\s*_]*[:：](?P<rest>.*)", re.IGNORECASE)
_BULLET = re.compile(r"\s*(?:[-*•]|\d+[.)])\s*")
_AROUND: Final = " \t.*_`\"'<>[]"


class KeywordReader:
    """Reads keywords with one expert, which is loaded on first use, on its own host. Close it after use.

    Args:
        name: a chat expert of the snapshot: a model, an adapter (its base is loaded with it), or a remote one.
        engines: settings of the engines.
    """

    at_once: Final = 32
    """Texts read and stored together."""

    def __init__(self, name: str, snapshot: Snapshot, engines: EnginesConfig | None = None) -> None:
        self._expert = BackgroundExpert(name, snapshot, engines)
        self._identity = identity(snapshot.get(name), snapshot.experts)

    def read(self, texts: Sequence[str]) -> list[Words]:
        """The keywords of each of n texts.

        Raises:
            CoeError: the error of the first text whose keywords could not be read.
        """
        found = self.read_each(texts)
        for one in found:
            if isinstance(one, CoeError):
                raise one
        return [one for one in found if not isinstance(one, CoeError)]

    def read_each(self, texts: Sequence[str]) -> list[Words | CoeError]:
        """The keywords of each of n texts, or the error."""

        async def work(ask: AskText) -> list[Words | CoeError]:
            return list(await asyncio.gather(*(_words_or_error(ask, text) for text in texts)))

        try:
            return self._expert.run(work)
        except CoeError as error:  # the expert could not be opened
            return [error] * len(texts)

    def store(self) -> Store[Words]:
        """The store on disk of keywords that were read, keyed by the expert's identity and all settings."""
        settings = [_FORMAT, PROMPT, EXAMPLES, SAMPLES, TEMPERATURE, MAX_TOKENS, SEED, MAX_CHARACTERS, LONGEST, OFTEN]
        key = json.dumps(["keywords", self._identity, settings])
        path = coe_home() / "signals" / f"{hashlib.sha256(key.encode()).hexdigest()}.sqlite"
        return Store(path, _to_bytes, _from_bytes)

    def close(self) -> None:
        """Unload the expert."""
        self._expert.close()


def parse(answer: str) -> list[str]:
    """The keywords of one answer, with repetitions and of any length; none without a line "Keywords:".

    Reads all such lines; if nothing follows on the line, the lines below it.
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
    """The short keywords that occur in more than one answer: most frequent first, then in order of occurrence."""
    counts = Counter(word for words in answers for word in dict.fromkeys(words))  # in order of occurrence
    often = [word for word, count in counts.items() if count >= OFTEN and len(word) <= LONGEST]
    return tuple(sorted(often, key=lambda word: -counts[word]))


def request_of(text: str, sample: int, characters: int = MAX_CHARACTERS) -> GenerateRequest:
    """The request of one sample."""
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


async def _words_or_error(ask: AskText, text: str) -> Words | CoeError:
    if not text.strip():
        return ()
    answers = await asyncio.gather(*(_answer(ask, text, sample) for sample in range(SAMPLES)), return_exceptions=True)
    for one in answers:
        if isinstance(one, CoeError):
            return one
        if isinstance(one, BaseException):
            raise one
    return keep(parse(one) for one in answers if isinstance(one, str))


async def _answer(ask: AskText, text: str, sample: int) -> str:
    """One sample; of the start of the question if all of it exceeds the expert's context."""
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
