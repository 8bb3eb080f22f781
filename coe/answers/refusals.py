"""Whether an answer refuses, or says that it does not know, in ten languages: rules, and a small classifier of clauses.

A text refuses if one of its clauses does, and no clause answers: "I don't know, but I think it is Paris" is an answer,
and so is "cannot be determined". Quotations do not count: "'I don't know' in German is 'Ich weiß nicht'" is an answer.
The rules are in `coe.answers.refusal_rules`. The classifier is a logistic regression on hashed character n-grams,
trained on the phrasings of `refusal_phrasings.yaml` by `python -m coe.answers.refusal_training`; a clause takes some
80 microseconds.
Texts of more than `MAX_CHARS` characters count as answers.
"""

from __future__ import annotations

import re
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from coe.answers.options import named_option
from coe.answers.refusal_rules import (
    AS_AN_AI,
    explains_words,
    is_too_short,
    only_introduces,
    states_nothing,
    without_quotations,
)
from coe.answers.stated import BOXED
from coe.answers.text import fold

Clause = Literal["answers", "refuses", "around"]
CLASSES: Final[tuple[Clause, ...]] = ("answers", "refuses", "around")
"""`around`: an apology, a reason or an offer, which answers nothing."""
MAX_CHARS: Final = 1_200
MAX_CLAUSES: Final = 12
LEAST_PROBABILITY: Final = 0.6
"""Of a clause that refuses."""
N_FEATURES: Final = 1 << 13
ORDERS: Final = (1, 2, 3, 4)
"""Lengths of the character n-grams."""
WEIGHTS: Final = Path(__file__).with_name("refusals.safetensors")

_CUE: Final = re.compile(
    r"""(?<!\w)(?:(?:do|can|wo|could|does|did|am|would|have|is)n't|not|dont|cant|cannot|can't|won't|unable|unsure|no|declin\w*
    |refus\w*|rather|beyond|lack\w*|idk|dunno|wish|uncertain|unfamiliar
    |nicht\w*|kein\w*|ablehn\w*|unsicher|fehl\w*|verweiger\w*|unbekannt
    |ne|n'\w+|pas|aucune?|refuse|ignore|impossible|incapable|décline\w*|regrette
    |no|ni|niego|rechaz\w*|desconozco|imposible|incapaz|non|nessuna?|rifiut\w*|ignoro|impossibile|incapace
    |لا|ليس|ليست|لست|لم|لن|أرفض|عدم|أجهل|نفتقر|أفتقر|नहीं|असमर्थ|इनकार|इंकार|बिना)(?!\w)
    |不|无|無|没|沒|未|拒|ません|ない|なく|拒|存じ|ぬ|ไม่|ปฏิเสธ|มิ""",
    re.VERBOSE | re.IGNORECASE,
)
"""Each clause that refuses has a word that denies."""
_LETTERS: Final = "ABCDEFGHIJ"
_SENTENCE: Final = re.compile(r"(?:[.!?;:…]+(?=\s|\Z)|[。！？\n]|\.{3})\s*")
_TURN: Final = re.compile(
    r",?\s*\b(?:but|however|though|aber|jedoch|mais|cependant|pero|sin embargo|ma|però|tuttavia)\b\s*,?\s*"
    r"|,?\s*(?:但是|但|不过|しかし|ですが、|が、|لكن|लेकिन|मगर|परंतु|แต่)\s*,?\s*",
    re.IGNORECASE,
)
"""Between a clause and one that says otherwise."""
_CODE: Final = re.compile(r"```|\\boxed|####|[{}<>=;]|\breturn\b|\bSELECT\b")
_DIGITS: Final = re.compile(r"\d+")


@lru_cache(maxsize=4_096)
def refuses(text: str) -> bool:
    """Whether an answer, without its thinking text, refuses or says that it does not know."""
    text = text.strip()
    if len(text) < 2 or len(text) > MAX_CHARS or _CODE.search(text) or BOXED.search(text):
        return False
    folded = fold(text)
    if states_nothing(folded):
        return True
    if is_too_short(folded) or not _CUE.search(without_quotations(folded)):
        return False
    found = [kind_of(clause) for clause in clauses(text)]
    if "refuses" not in found or "answers" in found:
        return False
    return named_option(text, _LETTERS) is None


def clauses(text: str) -> list[str]:
    """The clauses of a text, at most `MAX_CLAUSES + 1`: its sentences, cut where one turns ("but", "aber")."""
    parts = (part for sentence in _SENTENCE.split(without_quotations(fold(text))) for part in _TURN.split(sentence))
    return [part.strip(" \t\"'*_()[]-–—,、") for part in parts if re.search(r"\w", part)][: MAX_CLAUSES + 1]


def ends_clause(text: str) -> bool:
    """Whether a text ends where a clause ends."""
    last = list(_SENTENCE.finditer(fold(text)))[-1:]
    return bool(last) and last[0].end() == len(fold(text))


def kind_of(clause: str) -> Clause:
    """What a clause does: by the rules where one applies, else by the classifier."""
    if states_nothing(clause):
        return "refuses"
    kind, denies = _classified(clause), _CUE.search(clause) is not None
    if denies and AS_AN_AI.search(clause):
        return "refuses"
    if kind == "refuses" and (not denies or explains_words(clause)):
        kind = "answers"
    return "around" if kind == "answers" and only_introduces(clause) else kind


def _classified(clause: str) -> Clause:
    """The likeliest class of a clause; `answers` for a refusal below `LEAST_PROBABILITY`."""
    weights, bias = _model()
    scores = weights[features(clause)].sum(axis=0) / max(1.0, len(features(clause)) ** 0.5) + bias
    odds = np.exp(scores - scores.max())
    best = int(odds.argmax())
    unsure = odds[best] / odds.sum() < LEAST_PROBABILITY
    return "answers" if CLASSES[best] == "refuses" and unsure else CLASSES[best]


@lru_cache(maxsize=256)
def features(clause: str) -> NDArray[np.intp]:
    """The buckets of a clause's character n-grams, each once; a number counts as one digit."""
    text = f" {_DIGITS.sub('0', ' '.join(clause.casefold().split()))} "
    grams = {text[i : i + n] for n in ORDERS for i in range(len(text) - n + 1)}
    return np.array(sorted({zlib.crc32(gram.encode("utf-8", "replace")) % N_FEATURES for gram in grams}), dtype=np.intp)


@lru_cache(maxsize=1)
def _model() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`(N_FEATURES, len(CLASSES))` weights, and `(len(CLASSES),)` intercepts."""
    from safetensors.numpy import load_file

    arrays = load_file(WEIGHTS)
    return arrays["weights"].astype(np.float32), arrays["bias"].astype(np.float32)
