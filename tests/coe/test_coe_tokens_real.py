"""Prompt tokens counted for the real bases of the zoo, against what their engine makes of the same conversations."""

from __future__ import annotations

from pathlib import Path

import pytest

from coe.tokens import TokenCounter, Tokenizers
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Message, Query

TEXTS = {
    "English": "The committee met on Tuesday to discuss the opening hours of the library. " * 4,
    "Russian": "Комитет собрался во вторник, чтобы обсудить часы работы библиотеки. " * 4,
    "Hindi": "समिति की बैठक मंगलवार को पुस्तकालय के समय पर चर्चा के लिए हुई। " * 4,
    "Arabic": "اجتمعت اللجنة يوم الثلاثاء لمناقشة ساعات عمل المكتبة. " * 4,
    "Thai": "คณะกรรมการประชุมกันเมื่อวันอังคารเพื่อหารือเรื่องเวลาเปิดทำการ " * 4,
    "Chinese": "委员会于星期二开会，讨论图书馆的开放时间。" * 4,
    "digits": "3141592653589793238462643383279502884197" * 4,
    "emoji": "😀🚀🔥🎉🌍" * 10,
    "code": "def f(x):\n    return [y for y in x if y]\n\n\n" * 8,
}


@pytest.mark.integration
@pytest.mark.parametrize("base", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_the_engine_counts_within_the_range(base: str, zoo_bases: Path) -> None:
    from transformers import AutoTokenizer

    from coe.engines import chat
    from coe.engines.render import Renderer

    folder, renderer = zoo_bases / base, Renderer()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    spec = ExpertSpec(name=base, kind=Kind.MODEL, source=str(folder), context_length=2000)
    counter = TokenCounter(Snapshot(1, {base: spec}), Tokenizers(count_s=120))
    for kind, text in TEXTS.items():
        turns = (Message("user", text), Message("assistant", text[:40]), Message("user", text))
        for messages in (turns[:1], turns):
            ids = chat.encode(tokenizer, GenerateRequest(messages=messages), renderer, expert=base)
            counted = counter.of(Query(messages))(base)
            assert counted is not None and counted.low <= len(ids) <= counted.high, kind
            assert len(ids) - counted.low <= 8 * len(messages) + 32, f"{kind}: the lower bound is close"
        raw = chat.encode(tokenizer, GenerateRequest(prompt=text), renderer, expert=base)
        exact = counter.of(Query.of(text, raw=True))(base)
        assert exact is not None and 0 <= len(raw) - exact.likely <= 1, f"{kind}: but for a first special token"
