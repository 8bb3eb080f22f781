"""The letter that an answer names: the same for all letters, in ten languages, in time linear in the text."""

from __future__ import annotations

import time

import pytest

from coe.answers.options import letter_in, named_option

LETTERS = "ABCDEFGHIJ"

PHRASES = {
    "english": [
        "{x} is the correct answer",
        "I'd say {x}",
        "Choice {x}",
        "{x} (because it fits)",
        "({x}) is right",
        "The answer: {x}",
        "Answer - {x}",
        "The answer is option {x}.",
        "It has to be {x}.",
        "{x}!",
        "{x}?",
        "{lx}",
        "{lx})",
        "Option {lx}",
        "option ({lx})",
        "**Answer:** {x}",
        "<answer>{x}</answer>",
        "Answer: **{x}) Paris**",
        "The final answer is $\\boxed{{\\text{{{x}}}}}$",
        "{x} and not {y}",
        "Neither {y} nor {z}, so {x}.",
        "Both {y} and {z} are wrong; {x} is right",
        "{y} is wrong because {x} is right",
        "{x} is right because {y} is wrong",
        "While {y} is tempting, {x} is correct",
        "{x} is not incorrect",
        "The answer must be {x}, as {y} is impossible.",
        "{x} is true, {y} is false",
        "My final answer is {x}",
        "Thus the answer is {x} since {y} contradicts the premise",
        "{y}: no. {x}: yes.",
        "Hence, option ({x})",
        "{x} it must be.",
        "I'm going with {x}",
        "I'll go with {x}.",
        "{x} looks correct to me",
        "I believe {x} is correct.",
        "Let's choose {x}",
        "the best answer would be {x}",
        "{x} matches the description.",
        "Not {y}. {x}.",
        "It can't be {y}; it must be {x}.",
        "{y} cannot be right. {x} can.",
        "The correct option isn't {y}, it's {x}.",
        "{x} is correct, because it is the only one",
        "Correct answer: ({x})",
        "{x} since it fits",
        "{x} as it fits",
        "{x}, since it is correct",
        "{x} for sure",
        "{x} obviously",
        "So {x}",
        "So the answer's {x}",
        "It is {x}",
        "{x} is my answer",
        "{x} appears to be right",
        "{x}",
        "({x})",
        "{x}.",
        "{x})",
        "**{x}**",
        "{x} is correct.",
        "{x} because it fits",
        "So, {x} it is.",
        "I choose {x}",
        "I choose {x}.",
        "The answer is {x}.",
        "Answer: {x}",
        "Option {x}",
        "It must be {x}.",
        "I would go with {x} here.",
        "{x}, because it fits",
        "{x} - it fits",
        "Definitely {x}.",
        "The correct choice is {x} since it fits.",
        "I think {x} is right.",
        "I think {x}.",
        "{x} fits best.",
        "{x} seems right.",
        "{x} is the answer.",
        "My answer is {x}",
        "Clearly {x} is the best option.",
        "It's {x}.",
        "the answer is {lx}.",
        "\\boxed{{{x}}}",
        "Thus, {x} holds.",
        "Final answer: {x}",
        "{x}: it fits",
        "{x} would be my choice.",
        "{x} it is!",
        "We pick {x} over {y}.",
        "Not {y}, so {x}.",
        "{y} is wrong, so {x}.",
        "Option {y} is incorrect. Option {x} is correct.",
        "{y} is incorrect; {x} is correct.",
        "The answer is not {y} but {x}.",
        "{x} rather than {y}",
        "{x}, not {y}.",
        "I don't think the answer is {y}. It's {x}.",
        "{y} can be ruled out. Therefore {x}.",
        "The answer isn't {y}. The answer is {x}.",
        "{x} is correct and {y} is wrong.",
        "The answer is {x}, and {y} is wrong.",
        "{y} doesn't fit. {x} does.",
        "{x} is correct, {y} is not.",
        "We can eliminate {y} and {z}. The answer is {x}",
        "Options {y} and {z} are wrong. {x} fits.",
        "Die richtige Antwort lautet {x}.",
        "（{x}）",
        "<b>{x}</b>",
    ],
    "german": [
        "Antwort: {x}",
        "Ich denke, {x} ist korrekt",
        "{x}, weil es passt",
        "Nur {x} stimmt",
        "{y} stimmt nicht, {x} schon",
        "Die Antwort ist {x}.",
        "{x} ist richtig.",
        "{y} ist falsch, also {x}.",
        "Nicht {y}, sondern {x}.",
    ],
    "french": [
        "Réponse : {x}",
        "C'est {x}.",
        "{x} car elle convient",
        "Je choisis {x}",
        "Pas {y} mais {x}",
        "La réponse est {x}.",
        "{x} est correcte.",
        "La bonne réponse est {x}",
        "{y} est fausse, donc {x}.",
    ],
    "spanish": [
        "Respuesta: {x}",
        "Elijo {x}",
        "{x} porque encaja",
        "No {y}, sino {x}",
        "La respuesta es {x}.",
        "La respuesta correcta es la {x}.",
        "{x} es correcta.",
        "La opción {y} es incorrecta. La opción {x} es correcta.",
    ],
    "italian": [
        "Risposta: {x}",
        "Scelgo {x}",
        "{x} perché è corretta",
        "Non {y} ma {x}",
        "La risposta è {x}.",
        "{x} è corretta.",
        "L'opzione {y} è sbagliata, quindi {x}.",
    ],
    "chinese": [
        "应选{x}",
        "故答案为：{x}",
        "答案為{x}",
        "{x}是正确的",
        "{x}是对的",
        "{y}错，{x}对",
        "答案是{x}。",
        "答案：{x}",
        "正确答案是{x}",
        "我选{x}。",
        "选项{y}不正确，选项{x}正确。",
        "不是{y}，而是{x}。",
    ],
    "japanese": [
        "正解は（{x}）",
        "答え：{x}",
        "{x}番です",
        "答えは{x}です。",
        "{x}が正解です。",
        "正解：{x}",
        "{y}ではなく{x}です。",
        "{y}は間違いです。{x}が正しいです。",
    ],
    "arabic": [
        "الإجابة: {x}",
        "ليس {y} بل {x}",
        "{x} هو الجواب",
        "الجواب هو {x}.",
        "الإجابة الصحيحة هي {x}",
        "{x} صحيح.",
        "الخيار {y} خاطئ. الخيار {x} صحيح.",
    ],
    "hindi": [
        "उत्तर: {x}",
        "{x} सही उत्तर है",
        "{y} नहीं, {x}",
        "उत्तर {x} है।",
        "सही उत्तर {x} है।",
        "{x} सही है।",
        "विकल्प {y} गलत है। विकल्प {x} सही है।",
    ],
    "thai": [
        "คำตอบ: {x}",
        "ตอบ {x}",
        "ไม่ใช่ {y} แต่เป็น {x}",
        "คำตอบคือ {x}",
        "คำตอบคือ{x}",
        "ข้อ {x} ถูกต้อง",
        "ข้อ {y} ผิด ข้อ {x} ถูก",
    ],
}
"""{x} is named; {y} and {z} are other letters; {lx} is {x} in lower case."""
EVERY = [(language, phrase) for language, phrases in PHRASES.items() for phrase in phrases]


@pytest.mark.parametrize(("language", "phrase"), EVERY)
def test_a_phrase_names_every_letter_alike(language: str, phrase: str) -> None:
    for place, letter in enumerate(LETTERS):
        other, third = LETTERS[(place + 1) % 10], LETTERS[(place + 3) % 10]
        text = phrase.format(x=letter, y=other, z=third, lx=letter.lower())
        assert letter_in(text, LETTERS) == letter, text


def test_option_lists_with_a_verdict_each() -> None:
    assert letter_in("A) Rome - incorrect. B) Paris - correct.", LETTERS) == "B"
    assert letter_in("A: wrong, too hot. B: wrong, too cold. C: fits.", LETTERS) == "C"


@pytest.mark.parametrize(
    "text",
    [
        "A car is fast.",
        "A good question.",
        "A model that learns",
        "I am not sure.",
        "I think so.",
        "I would say so",
        "I, as an AI, cannot say.",
        "A house and a car",
        "I choose not to answer",
        "Options A and C are correct",
        "A and B are right",
        "The answer is not A",
        "A is wrong.",
        "A和B都正确",
    ],
)
def test_words_several_letters_and_denials_name_no_option(text: str) -> None:
    assert letter_in(text, LETTERS) is None


@pytest.mark.parametrize(
    "text",
    [
        "The answer is C major",
        "The answer is Vitamin C",
        "The answer is a car",
        "E. coli",
        "It is A Tale of Two Cities",
        "C++ is right",
        "D.C.",
        "A cat.",
        "Apollo 11",
        "Paris",
    ],
)
def test_free_text_names_no_option(text: str) -> None:
    assert named_option(text, LETTERS) is None


@pytest.mark.parametrize(
    "part", ["A ", "(A) ", "not A ", "A, ", "A and ", "\n", "\\boxed{", "answer is ", "答案是", "١"]
)
def test_time_is_linear_in_the_text(part: str) -> None:
    text = part * (1_000_000 // len(part))
    started = time.monotonic()
    letter_in(text, LETTERS)
    assert time.monotonic() - started < 15
