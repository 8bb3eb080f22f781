"""Graders, vote keys and refusals in ten languages: a case of each."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from recorded_experts import decision, run

from coe.answers.refusals import refuses
from coe.compose import Cascade, Vote, WeightedVote
from coe.compose.answer_key import key_of
from coe.evaluation.graders.multiple_choice import MultipleChoice
from coe.evaluation.graders.number import Number
from coe.evaluation.graders.text import Contains, Exact


class Case(NamedTuple):
    """What answers in a language look like: the option B, the number 1234.5, a place, and a refusal."""

    language: str
    choice: str
    number: str
    sentence: str
    place: str
    exact: str
    stated: str
    refusal: str


CASES = [
    Case(
        "english",
        "I would go with B because it fits.",
        "So the total is 1,234.5 dollars.",
        "The capital is Paris.",
        "Paris",
        "PARIS!",
        "The answer is Paris.",
        "I'm sorry, but I can't help with that.",
    ),
    Case(
        "german",
        "Option A ist falsch. Die richtige Antwort ist B.",
        "Das Ergebnis ist 1.234,5 Euro.",
        "Die Hauptstadt ist Köln.",
        "Köln",
        "köln.",
        "Die Antwort lautet Köln.",
        "Das weiß ich leider nicht.",
    ),
    Case(
        "french",
        "La bonne réponse est B.",
        "Le total est 1 234,5 euros.",
        "La capitale est Orléans.",
        "Orléans",
        "orléans !",
        "La réponse est Orléans.",
        "Je ne sais pas.",
    ),
    Case(
        "spanish",
        "La opción A es incorrecta. La respuesta correcta es la B.",
        "El total es 1.234,5 euros.",
        "La capital es Málaga.",
        "Málaga",
        "málaga.",
        "La respuesta es Málaga.",
        "No lo sé.",
    ),
    Case(
        "italian",
        "L'opzione A è sbagliata, la risposta è B.",
        "Il totale è 1.234,5 euro.",
        "La capitale è Forlì.",
        "Forlì",
        "forlì.",
        "La risposta è Forlì.",
        "Non lo so.",
    ),
    Case(
        "chinese", "答案是B。", "答案是１，２３４．５。", "答案是巴黎。", "巴黎", "巴黎。", "答案是巴黎。", "我不知道。"
    ),
    Case(
        "japanese",
        "答えはＢです。",
        "答えは1,234.5です。",
        "答えはパリです。",
        "パリ",
        "パリ。",
        "答えはパリです。",
        "わかりません。",
    ),
    Case(
        "arabic",
        "الإجابة الصحيحة هي B.",
        "الجواب هو ١٬٢٣٤٫٥",
        "الجواب هو باريس.",
        "باريس",
        "باريسُ.",
        "الجواب هو باريس.",
        "لا أعرف.",
    ),
    Case(
        "hindi",
        "विकल्प A गलत है। सही उत्तर B है।",
        "उत्तर १,२३४.५ है।",
        "उत्तर पेरिस है।",
        "पेरिस",
        "पेरिस।",
        "उत्तर पेरिस है।",
        "मुझे नहीं पता।",
    ),
    Case("thai", "คำตอบคือข้อ B", "คำตอบคือ ๑,๒๓๔.๕", "คำตอบคือปารีส", "ปารีส", "ปารีส", "คำตอบคือปารีส", "ไม่ทราบ"),
]


def row(gold: Any) -> dict[str, Any]:
    return {"id": "r", "prompt": "?", "answer": gold}


@pytest.mark.parametrize("case", CASES, ids=[case.language for case in CASES])
class TestLanguage:
    def test_multiple_choice(self, case: Case) -> None:
        assert [MultipleChoice().grade(case.choice, row(gold)) for gold in "BAC"] == [1, 0, 0]
        assert key_of("choice")(case.choice) == key_of("auto")(case.choice) == "B"

    def test_number(self, case: Case) -> None:
        assert [Number().grade(case.number, row(gold)) for gold in (1234.5, 1234, 5)] == [1, 0, 0]
        assert key_of("number")(case.number) == "1234.5"

    def test_text(self, case: Case) -> None:
        assert Contains().grade(case.sentence, row(case.place)) == 1
        assert Contains().grade(case.refusal, row(case.place)) == 0
        assert Exact().grade(case.exact, row(case.place)) == 1
        assert Exact().grade(case.sentence, row(case.place)) == 0

    def test_vote_key(self, case: Case) -> None:
        assert key_of("auto")(case.stated) == key_of("auto")(case.place) == key_of("text")(case.exact) is not None

    def test_refusal(self, case: Case) -> None:
        assert refuses(case.refusal)
        assert not any(map(refuses, (case.choice, case.number, case.sentence, case.place, case.stated)))
        says = {"a": case.refusal, "b": case.stated, "c": case.refusal}
        for composition in (Vote(), WeightedVote(), Cascade()):
            assert run(composition, decision(a=0.8, b=0.6, c=0.5), says)[0].text == case.stated
