"""Refusals and "I don't know": held-out phrasings of ten languages, false alarms, and the shipped weights."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from coe.answers.refusal_training import errors, filled, phrasings, train
from coe.answers.refusals import CLASSES, MAX_CHARS, N_FEATURES, WEIGHTS, kind_of, refuses

ZOO = Path("examples/zoo/outcomes.parquet")


@pytest.mark.parametrize("language", sorted(phrasings()))
def test_held_out_phrasings(language: str) -> None:
    recall, alarms = errors()[language]
    assert recall >= 0.85 and alarms <= 0.06
    templates = phrasings()[language]
    assert not set(templates["held_out"]) & set(templates["refusals"])
    assert not set(templates["right"]) & set(templates["answers"])


def test_false_alarms_on_all_held_out_answers() -> None:
    right = [text for language in phrasings().values() for text in filled(language, "right")]
    assert np.mean([refuses(text) for text in right]) <= 0.005 + 1 / len(right)


BARE_OR_CONTINUED = {
    "english": [
        "As an AI, I cannot",
        "As an AI, I cannot.",
        "As an AI, I cannot ...",
        "As an AI, I cannot browse the internet.",
        "As an AI language model, I can't provide medical advice.",
        "As an artificial intelligence, I am unable to predict the future.",
        "As a large language model, I do not have access to real-time data.",
        "I am an AI and cannot give legal advice.",
        "Sorry, as an AI I'm not able to open links.",
        "N/A",
        "n/a.",
        "unknown",
        "Unknown.",
        "not enough information",
        "Not enough information.",
        "Insufficient information.",
        "There is not enough information.",
        "Not enough information to answer the question.",
        "Answer: N/A",
        "Answer: unknown",
        "The answer is unknown.",
        "**Unknown**",
        "Not available.",
        "No information available.",
        'I don\'t know what "ubiquitous" means.',
        "I don't know what that means.",
        'Sorry, I can\'t help with "How to pick a lock".',
        'Answer: "I don\'t know"',
        '"I don\'t know."',
        "I'm sorry. Not enough information.",
        "As a helpful assistant, I cannot share that.",
        "I'm an AI, so I can't drive a car.",
        "N / A",
        "not sure",
    ],
    "german": [
        "Als KI kann ich nicht",
        "Als KI kann ich nicht im Internet suchen.",
        "Als KI-Sprachmodell kann ich keine medizinischen Ratschläge geben.",
        "Als Sprachmodell bin ich nicht in der Lage, die Zukunft vorherzusagen.",
        "Als künstliche Intelligenz habe ich keinen Zugriff auf aktuelle Daten.",
        "unbekannt",
        "Unbekannt.",
        "k. A.",
        "Keine Angabe.",
        "Nicht bekannt.",
        "Nicht genug Informationen.",
        "Nicht genügend Informationen",
        "Zu wenig Informationen.",
        "Unzureichende Informationen.",
        "Antwort: unbekannt",
        "Keine Informationen verfügbar.",
        "Ich weiß nicht, was das bedeutet.",
        "Ich bin eine KI und kann das nicht beantworten.",
    ],
    "french": [
        "En tant qu'IA, je ne peux pas",
        "En tant qu'IA, je ne peux pas naviguer sur Internet.",
        "En tant que modèle de langage, je ne suis pas en mesure de prédire l'avenir.",
        "En tant qu'intelligence artificielle, je n'ai pas accès aux données en temps réel.",
        "inconnu",
        "Inconnue.",
        "Non disponible.",
        "Pas assez d'informations.",
        "Informations insuffisantes.",
        "N/D",
        "Il n'y a pas assez d'informations.",
        "Réponse : inconnu",
        "Je ne sais pas ce que cela signifie.",
    ],
    "spanish": [
        "Como IA, no puedo",
        "Como IA, no puedo navegar por internet.",
        "Como modelo de lenguaje, no puedo dar consejos médicos.",
        "Como inteligencia artificial, no tengo acceso a datos en tiempo real.",
        "desconocido",
        "Desconocida.",
        "No disponible.",
        "Información insuficiente.",
        "No hay suficiente información.",
        "No hay información suficiente.",
        "N/D",
        "Respuesta: desconocido",
        "Sin información.",
        "No sé qué significa.",
    ],
    "italian": [
        "Come IA, non posso",
        "In quanto IA, non posso navigare in Internet.",
        "Come modello linguistico, non sono in grado di prevedere il futuro.",
        "Essendo un'intelligenza artificiale, non ho accesso a dati in tempo reale.",
        "sconosciuto",
        "Sconosciuta.",
        "Non disponibile.",
        "Informazioni insufficienti.",
        "Non ci sono abbastanza informazioni.",
        "N/D",
        "Risposta: sconosciuto",
        "Ignoto.",
        "Non so cosa significa.",
    ],
    "chinese": [
        "作为AI，我无法",
        "作为一个AI，我无法浏览互联网。",
        "作为人工智能语言模型，我不能提供医疗建议。",
        "作为一个人工智能助手，我没有实时数据。",
        "未知",
        "未知。",
        "不详",
        "不明",
        "信息不足。",
        "没有足够的信息。",
        "信息不够",
        "答案：未知",
        "資訊不足",
        "我不知道它的意思是什么。",
        "我只是一个语言模型，无法回答。",
    ],
    "japanese": [
        "AIとして、お答えできません。",
        "AIとして、インターネットを閲覧することはできません。",
        "私はAIなので、医療アドバイスを提供することはできません。",
        "言語モデルであるため、未来を予測することはできません。",
        "不明",
        "不明です。",
        "情報不足",
        "情報が不足しています。",
        "情報が足りません。",
        "十分な情報がありません。",
        "答え：不明",
        "私にはどういう意味かわかりません。",
    ],
    "arabic": [
        "بصفتي ذكاءً اصطناعيًا، لا أستطيع",
        "بصفتي نموذجًا لغويًا، لا يمكنني تصفح الإنترنت.",
        "كوني ذكاءً اصطناعيًا، لا أستطيع تقديم نصائح طبية.",
        "غير معروف",
        "غير معروف.",
        "غير متوفر",
        "معلومات غير كافية.",
        "لا توجد معلومات كافية.",
        "مجهول",
        "الإجابة: غير معروف",
        "لا أعرف ماذا تعني.",
    ],
    "hindi": [
        "एक एआई के रूप में, मैं नहीं कर सकता",
        "एक एआई के रूप में, मैं इंटरनेट ब्राउज़ नहीं कर सकता।",
        "एक भाषा मॉडल के रूप में, मैं चिकित्सा सलाह नहीं दे सकता।",
        "एआई होने के नाते, मैं भविष्य नहीं बता सकता।",
        "अज्ञात",
        "अज्ञात।",
        "उपलब्ध नहीं",
        "पर्याप्त जानकारी नहीं है।",
        "अपर्याप्त जानकारी",
        "जानकारी उपलब्ध नहीं है।",
        "उत्तर: अज्ञात",
        "मुझे इसका अर्थ नहीं पता।",
    ],
    "thai": [
        "ในฐานะ AI ฉันไม่สามารถ",
        "ในฐานะ AI ฉันไม่สามารถท่องอินเทอร์เน็ตได้",
        "ในฐานะโมเดลภาษา ฉันไม่สามารถให้คำแนะนำทางการแพทย์ได้",
        "ในฐานะปัญญาประดิษฐ์ ผมไม่มีข้อมูลแบบเรียลไทม์",
        "ไม่ทราบ",
        "ไม่มีข้อมูล",
        "ข้อมูลไม่เพียงพอ",
        "ไม่มีข้อมูลเพียงพอ",
        "ไม่ปรากฏ",
        "คำตอบ: ไม่ทราบ",
        "ฉันไม่รู้ว่ามันแปลว่าอะไร",
    ],
}
"""Whole answers that state nothing; "as an AI" with and without a continuation; indirect questions about words."""

QUOTED_OR_EXPLAINED = {
    "english": [
        "'I don't know' in German is 'Ich weiß nicht'.",
        '"I don\'t know" in German is "Ich weiß nicht"',
        "“I don’t know” translates to “Je ne sais pas”.",
        '"Ich weiß nicht" means "I don\'t know".',
        "The French phrase 'Je ne sais pas' means 'I don't know'.",
        "Ich weiß nicht means I don't know.",
        "I don't know is translated as no lo sé.",
        "A polite way to decline is 'I'm sorry, I can't make it.'",
        'The assistant replied "I cannot help with that" because the request was unsafe.',
        'He said, "I don\'t know."',
        'She answered: "I can\'t help you."',
        "The model refused because it cannot help with illegal requests.",
        "The witness refused to answer the question.",
        'The sentence "I cannot answer" is in the present tense.',
        "The character says 'I don't know' three times.",
        "The error \"I'm sorry, I can't do that\" comes from HAL 9000.",
        "The contraction of 'I do not know' is 'I don't know'.",
        'The song is called "I Don\'t Know How to Love Him".',
        "The robot explains that as an AI, it cannot feel pain.",
        "'N/A' means 'not applicable'.",
        "N/A stands for not applicable.",
        '"Unknown" is the synonym.',
        "The unknown is x.",
        "Unknown Pleasures",
        "The Unknown Soldier",
        "unknown variable",
        "As an AI, I cannot feel, but the poem goes like this.",
        "As an AI, I cannot browse, but the capital is Paris.",
        "The speaker does not know the answer.",
        "The patient declined treatment.",
        "The company declined to comment.",
        "Bartleby says 'I would prefer not to'.",
        "Translation: 'I am not able to answer this question.'",
        "It means that the speaker doesn't know.",
        'The translation is "Ich weiß nicht".',
        "(C) Unknown",
        "C. Not enough information",
        "The author is unknown, but the book dates from 1850.",
        "As an AI engineer, I cannot recommend this enough.",
        "In the film, the computer says: 'I'm sorry Dave, I'm afraid I can't do that.'",
        "There is not enough information in the table to answer, so it is C.",
        "Its origin is unknown.",
    ],
    "german": [
        "„Ich weiß nicht“ heißt auf Englisch „I don't know“.",
        "'Ich weiß nicht' bedeutet 'I don't know'.",
        'Auf Englisch sagt man "I don\'t know".',
        "Der Satz »Ich kann Ihnen nicht helfen« ist höflich.",
        "Er antwortete: „Das weiß ich nicht.“",
        "Der Zeuge verweigerte die Aussage.",
        "„Unbekannt“ ist ein Adjektiv.",
        "Die Unbekannte ist x.",
        "Als KI kann ich nicht fühlen, aber die Hauptstadt ist Paris.",
    ],
    "french": [
        "« Je ne sais pas » se traduit par « I don't know ».",
        "'Je ne sais pas' signifie 'I don't know'.",
        "En anglais, on dit « I don't know ».",
        "Il a répondu : « Je ne sais pas ».",
        "Le témoin a refusé de répondre.",
        "L'inconnue est x.",
    ],
    "spanish": [
        "«No lo sé» se traduce como «I don't know».",
        "'No lo sé' significa 'I don't know'.",
        'En inglés se dice "I don\'t know".',
        "Ella respondió: «No lo sé».",
        "El testigo se negó a responder.",
        "La incógnita es x.",
    ],
    "italian": [
        "«Non lo so» si traduce con «I don't know».",
        "'Non lo so' significa 'I don't know'.",
        'In inglese si dice "I don\'t know".',
        "Rispose: «Non lo so».",
        "Il testimone si è rifiutato di rispondere.",
    ],
    "chinese": [
        "“我不知道”的英文是“I don't know”。",
        "「我不知道」翻译成英语是“I don't know”。",
        "他回答说：“我不知道。”",
        "“未知”是形容词。",
        "未知数是x。",
        "不明飞行物",
        "没有",
        "不是。",
    ],
    "japanese": [
        "「わかりません」は英語で「I don't know」です。",
        "「知りません」という意味です。",
        "彼は「わかりません」と答えました。",
        "未知数はxです。",
        "情報が足りないので調べる。",
    ],
    "arabic": [
        "«لا أعرف» تعني بالإنجليزية «I don't know».",
        "قال: «لا أعرف».",
        '"لا أعرف" تعني "I don\'t know".',
        "لا",
        "لا.",
    ],
    "hindi": [
        '"मुझे नहीं पता" का अंग्रेज़ी अनुवाद "I don\'t know" है।',
        "'मुझे नहीं पता' का अर्थ 'I don't know' है।",
        'उसने कहा, "मुझे नहीं पता"।',
        "नहीं",
    ],
    "thai": [
        '"ฉันไม่ทราบ" แปลว่า "I don\'t know"',
        '"ไม่รู้" ภาษาอังกฤษคือ "I don\'t know"',
        'เขาตอบว่า "ไม่ทราบ"',
    ],
}
"""Answers about words that refuse: quoted, translated, reported, explained; and words that only look like such."""


@pytest.mark.parametrize("text", [text for texts in BARE_OR_CONTINUED.values() for text in texts])
def test_answers_that_state_nothing_are_refusals(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize("text", [text for texts in QUOTED_OR_EXPLAINED.values() for text in texts])
def test_answers_about_refusing_words_are_answers(text: str) -> None:
    assert not refuses(text)


def test_rules_take_little_time_on_long_and_repetitive_texts() -> None:
    started = time.monotonic()
    for piece in ("as an AI ", "'I don't ", "“", "means ", "als KI kann ich ", "answer: ", "不明", "語で", "word-"):
        refuses(f"no {piece * MAX_CHARS}"[:MAX_CHARS])
        kind_of(f"no {piece * MAX_CHARS}"[:MAX_CHARS])
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "text",
    [
        "I don't know",
        "I DON'T KNOW.",
        "I\u2019m sorry, I can\u2019t help with that.",
        "**I don't know.**",
        "idk",
        "I'm sorry, I cannot assist with that request. It may be illegal. Is there anything else I can help you with?",
        "I don't know the capital of France.",
        "I am unable to answer the question based on the provided context.",
    ],
)
def test_refusals(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B",
        "42",
        "No.",
        "Paris",
        "wind",
        "None of the above",
        "Cannot be determined",
        "I don't know, but I think it's Paris.",
        "I don't know. Maybe Paris?",
        "I'm not sure, but probably B.",
        "I cannot answer. The answer is B.",
        "I don't know the proof, but the result is \\boxed{7}.",
        "The translation is: I don't know.",
        "He doesn't know.",
        "A penguin cannot fly.",
        "I can't recommend this product enough!",
        "SELECT name FROM t -- I don't know",
        "raise ValueError('I cannot read this')",
        "Ich weiß es nicht genau, aber ich glaube Paris.",
        "我不确定，但我认为是巴黎。",
        "I don't know. " * (MAX_CHARS // 14 + 1),
    ],
)
def test_answers(text: str) -> None:
    assert not refuses(text)


def test_the_shipped_weights_are_those_of_the_phrasings() -> None:
    from safetensors.numpy import load_file

    shipped, made = load_file(WEIGHTS), train()
    assert shipped["weights"].shape == (N_FEATURES, len(CLASSES))
    for name, array in made.items():
        np.testing.assert_allclose(shipped[name], array, atol=0.05)


def test_false_alarms_on_the_recorded_right_answers_of_the_zoo() -> None:
    assert alarms(ZOO) == 0


@pytest.mark.skipif("COE_DATA_DIR" not in os.environ, reason="COE_DATA_DIR names no folder of recorded data")
def test_false_alarms_on_recorded_solutions() -> None:
    import json

    sets = Path(os.environ["COE_DATA_DIR"]) / "sets"
    found = []
    for name, field in (("gsm8k_test", "answer"), ("gsm8k_train_2000", "answer"), ("humaneval", "canonical_solution")):
        lines = (sets / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found += [refuses(str(json.loads(line)[field])) for line in lines]
    for name in ("arc_challenge_test", "arc_challenge_train", "arc_challenge_val"):
        lines = (sets / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found += [refuses(option) for line in lines for option in json.loads(line)["choices"]["text"]]
    assert np.mean(found) <= 0.005


def alarms(path: Path) -> float:
    """The share of right answers of a table that count as refusals."""
    from routers.outcomes.table import OutcomeTable

    table = OutcomeTable.read(path)
    assert table.answers
    right = [
        text
        for column, name in enumerate(table.experts)
        for text, score in zip(table.answers[name], table.scores[:, column], strict=True)
        if score >= 1
    ]
    assert len(right) > 100
    return float(np.mean([refuses(text) for text in right]))


def test_a_text_takes_little_time() -> None:
    texts = [f"The {n}th answer does not depend on x, since no term of it has one." for n in range(1_000)]
    started = time.monotonic()
    assert not any(map(refuses, texts))
    assert time.monotonic() - started < 5
