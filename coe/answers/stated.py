"""The part of a text that states its answer: `\\boxed{...}`, `#### ...`, "the answer is ..." in ten languages."""

from __future__ import annotations

import re
from typing import Final

from coe.answers.text import fold

BOXED: Final = re.compile(r"\\boxed\s?\{([^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+)\}")
_HASHES: Final = re.compile(r"####\s*+([^\n]++)")
_ANSWER: Final = re.compile(
    r"""(?:\banswer\b(?:\s++(?:is|was|would\s+be|should\s+be|must\s+be)\b)?
        |\b(?:Antwort|Lösung|Ergebnis)\s++(?:ist|lautet|wäre)\b|\b(?:Antwort|Lösung|Ergebnis)(?=\s?:)
        |\b(?:réponse|résultat)(?:\s++(?:correcte|finale|exacte))?\s++(?:est|serait)\b|\b(?:réponse|résultat)(?=\s?:)
        |\b(?:respuesta|resultado)(?:\s++(?:correct[ao]|final))?\s++(?:es|sería)\b|\b(?:respuesta|resultado)(?=\s?:)
        |\b(?:risposta|risultato)(?:\s++(?:corrett[ao]|giust[ao]|finale))?\s++(?:è|sarebbe)|\b(?:risposta|risultato)(?=\s?:)
        |答案(?:应该|應該|应)?(?:是|为|為|就是|:)|(?:答え|正解|解答|回答)(?:は|:)
        |(?:الجواب|الإجابة|الاجابة|النتيجة)(?:\s++(?:الصحيحة|الصحيح|النهائية|النهائي))?(?:\s++(?:هو|هي)\b|(?=\s?:))
        |(?:उत्तर|जवाब)(?:\s++है(?=\s?:))?(?:\s?:|(?=\s))|คำตอบ(?:ที่ถูกต้อง|สุดท้าย)?\s?+(?:คือ|:)|답은|정답은)
        \s*+[:=]?\s*+[*_]*+\s*+([^\n]++)""",
    re.VERBOSE | re.IGNORECASE,
)
_STEMS: Final = (
    *("answer", "antwort", "lösung", "ergebnis", "réponse", "résultat", "respuesta", "resultado", "risposta"),
    *(
        "risultato",
        "答案",
        "答え",
        "正解",
        "解答",
        "回答",
        "الجواب",
        "الإجابة",
        "الاجابة",
        "النتيجة",
        "उत्तर",
        "जवाब",
        "คำตอบ",
        "답은",
    ),
    "정답은",
)
"""The words that `_ANSWER` begins with, in lower case."""
_SENTENCE: Final = re.compile(r"[^。]++")
_COPULA: Final = re.compile(
    r"(?:\s?(?:です|でした|である|だ|になります|となります|입니다|이다)|\s(?:है|हैं|होगा|होगी|था|थी|ครับ|ค่ะ))\Z"
)


def boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}`."""
    found = BOXED.findall(text)
    return found[-1] if found else None


def stated_answer(text: str) -> str | None:
    """The answer that the text states last, folded; None if it states none."""
    text = fold(text)
    found = BOXED.findall(text) or _HASHES.findall(text) or _after_stems(text)
    return without_copula(str(found[-1])) if found else None


def _after_stems(text: str) -> list[str]:
    """What follows each statement. Searching for its first word first takes a tenth of the pattern's time."""
    lower = text.lower()
    if len(lower) != len(text):  # a letter that is two in lower case
        return [str(found) for found in _ANSWER.findall(text)]
    places = sorted(match.start() for stem in _STEMS for match in re.finditer(stem, lower))
    found, end = [], 0
    for place in places:
        if place >= end and (match := _ANSWER.match(text, place)):
            found.append(match[1])
            end = match.end()
    return found


def without_copula(text: str) -> str:
    """The first sentence up to a `。`, without the copula that ends a Japanese, Hindi or Korean statement."""
    first = _SENTENCE.search(text)
    sentence = (first[0] if first else text).strip()
    return _COPULA.sub("", sentence).strip() if not sentence.isascii() else sentence
