"""Estimated prompt tokens: ranges that hold for tokenizers of small and large vocabularies, in every script."""

from __future__ import annotations

import pytest

from routers.base import Message, Query
from routers.tokens import TokenRange, estimate_range, most_tokens

MEASURED = {
    "English": (
        "The committee met on Tuesday to discuss the proposed changes to the opening hours of the library.",
        6,
        (108, 108),
    ),
    "German": (
        "Der Ausschuss traf sich am Dienstag, um die Änderungen der Öffnungszeiten zu besprechen.",
        6,
        (204, 114),
    ),
    "French": (
        "Le comité s'est réuni mardi pour examiner les changements proposés aux horaires de la bibliothèque.",
        6,
        (168, 114),
    ),
    "Spanish": (
        "El comité se reunió el martes para debatir los cambios en el horario de apertura de la biblioteca.",
        6,
        (192, 126),
    ),
    "Italian": (
        "Il comitato si è riunito martedì per discutere le modifiche agli orari di apertura della biblioteca.",
        6,
        (210, 138),
    ),
    "Russian": ("Комитет собрался во вторник, чтобы обсудить изменения в часах работы библиотеки.", 6, (360, 114)),
    "Arabic": ("اجتمعت اللجنة يوم الثلاثاء لمناقشة التغييرات المقترحة في ساعات عمل المكتبة.", 6, (426, 138)),
    "Hindi": ("समिति की बैठक मंगलवार को पुस्तकालय के खुलने के समय में बदलावों पर चर्चा करने के लिए हुई।", 6, (552, 132)),
    "Thai": ("คณะกรรมการประชุมกันเมื่อวันอังคารเพื่อหารือเกี่ยวกับการเปลี่ยนแปลงเวลาเปิดทำการ", 6, (864, 108)),
    "Chinese": ("委员会于星期二开会，讨论图书馆开放时间的拟议变更。", 12, (540, 180)),
    "Japanese": ("委員会は火曜日に集まり、図書館の開館時間の変更案について話し合いました。", 12, (840, 240)),
    "Korean": ("위원회는 화요일에 모여 도서관 개관 시간의 변경안을 논의했습니다.", 12, (948, 252)),
    "emoji": ("😀🚀🔥🎉🌍🍕🐶✨💡📦", 20, (580, 200)),
    "digits": ("3141592653589793238462643383279502884197", 10, (400, 400)),
    "numbers": ("271828 1828 45904 5235 36028 747135 2662 497757 ", 10, (480, 480)),
    "hexadecimal": ("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", 8, (464, 464)),
    "base64": ("TWFuIGlzIGRpc3Rpbmd1aXNoZWQsIG5vdCBvbmx5IGJ5IGhpcyByZWFzb24sIGJ1dCA", 8, (384, 336)),
    "Python": (
        "    def count(self, texts: list[str]) -> list[int]:\n        return [len(text.split()) for text in texts]\n",
        6,
        (187, 198),
    ),
    "JSON": (
        '{"id": 17, "name": "user_17", "email": "user17@example.com", "active": true, "score": 0.482},\n',
        6,
        (264, 264),
    ),
    "spaces": (" ", 600, (10, 37)),
    "line breaks": ("\n", 600, (150, 20)),
    "dashes": ("-", 600, (10, 38)),
    "one letter": ("a", 900, (225, 113)),
}
"""Kind -> a text, its repetitions, and the tokens that SmolLM2 (49,152 tokens) and Gemma 3 (262,144) make of all."""
FITTED = ("English", "German", "French", "Spanish", "Italian", "digits", "numbers", "hexadecimal", "Python", "JSON")
"""Kinds whose likely number is close to the mean of the two."""


@pytest.mark.parametrize("kind", MEASURED)
def test_the_range_holds_for_small_and_large_vocabularies(kind: str) -> None:
    text, times, counts = MEASURED[kind]
    found = TokenRange.of_text(text * times)
    assert found.low <= min(counts) and max(counts) <= found.high
    assert found.low <= found.likely <= found.high
    assert most_tokens(Query.of(text * times)) >= found.high, "bytes are the upper bound that costs nothing"


@pytest.mark.parametrize("kind", FITTED)
def test_the_likely_number_is_close_where_tokenizers_agree(kind: str) -> None:
    text, times, counts = MEASURED[kind]
    mean = sum(counts) / len(counts)
    assert abs(TokenRange.of_text(text * times).likely - mean) <= 0.32 * mean


def test_a_template_adds_to_every_message_but_nothing_to_a_raw_prompt() -> None:
    raw, chat = Query.of("a b c", raw=True), Query.of("a b c")
    turns = Query((Message("user", "a"), Message("assistant", "b"), Message("user", "c")))
    assert estimate_range(raw) == TokenRange.of_text("a b c")
    assert estimate_range(raw).low == estimate_range(chat).low
    assert estimate_range(raw).likely < estimate_range(chat).likely < estimate_range(turns).likely
    assert most_tokens(raw) == 5 < most_tokens(chat) < most_tokens(turns)


def test_tools_count_except_in_the_lower_bound() -> None:
    plain, tools = Query.of("hi"), Query.of("hi", tools=({"name": "f" * 40, "about": "weather in a town"},))
    assert estimate_range(tools).low == estimate_range(plain).low
    assert estimate_range(tools).likely > estimate_range(plain).likely + 10
    assert most_tokens(tools) > most_tokens(plain) + 60


def test_odd_texts_have_a_range_too() -> None:
    assert estimate_range(Query(())) == TokenRange(0, 0, 0) and most_tokens(Query(())) == 0
    for text in ("", "\ud800", "\U0010ffff" * 3, "\x00", "é", "\u200d"):
        found = estimate_range(Query.of(text))
        assert 0 <= found.low <= found.likely <= found.high <= most_tokens(Query.of(text)) + 4
