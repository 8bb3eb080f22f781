"""The generated conversations: seeded, held out by split, labelled by the topic of their last turn."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from examples.zoo.conversations import follow_ups as text
from examples.zoo.conversations.generate import KINDS, MOST_TURNS, Conversation, conversations
from examples.zoo.families import FAMILIES, Split
from routers.conversation.training import phrasings

HAND = Path(text.__file__).with_name("by_hand.jsonl")
HELD_OUT = (Split.TEST, Split.FRESH)


def made(split: Split = Split.TEST, n: int = 320, seed: int = 0) -> list[Conversation]:
    return conversations(split, n, seed=seed)


def test_conversations_depend_on_the_seed_alone() -> None:
    assert made() == made() != made(seed=1)
    assert made(n=20) == made(n=320)[:20]


@pytest.mark.parametrize("name", text.POOLS)
def test_splits_share_no_template_and_no_word(name: str) -> None:
    pool = text.POOLS[name]
    for one, other in combinations(Split, 2):
        assert not set(pool.of(one)) & set(pool.of(other))
    assert all(pool.of(split) for split in Split)


def test_the_classifier_of_turns_knows_no_held_out_template() -> None:
    known = {
        _plain(p) for language in phrasings().values() for kind in ("follow_ups", "complete") for p in language[kind]
    }
    changes = {_plain(p) for language in phrasings().values() for p in language["changes"]}
    for pool in (*text.FOLLOW_UPS.values(), text.GENERIC):
        assert not {_plain(template) for split in HELD_OUT for template in pool.of(split)} & known
    assert not {_plain(t) for split in HELD_OUT for t in text.TRANSITIONS.of(split) if t != "{p}"} & changes


def test_half_are_follow_ups_of_two_to_six_turns_over_all_families() -> None:
    found = made(n=640)
    assert Counter(one.kind for one in found) == dict.fromkeys(KINDS, 320)
    assert {one.n_turns for one in found} == set(range(2, MOST_TURNS + 1))
    assert {one.expert for one in found} == set(FAMILIES)
    assert len({tuple(m.content for m in one.messages) for one in found}) == 640


def test_the_label_is_the_topic_of_the_last_turn() -> None:
    prompts = {row.prompt: name for name, family in FAMILIES.items() for row in family.rows(Split.TEST, 60, seed=77)}
    for one in made():
        users = [message.content.split("\n\n<")[0] for message in one.messages if message.role == "user"]
        topics = [name for turn in users for prompt, name in prompts.items() if turn.endswith(prompt)]
        assert topics[0] == one.first and topics[-1] == one.expert
        if one.kind == "topic change":
            assert any(users[-1].endswith(prompt) for prompt in prompts)


def test_those_by_hand_are_conversations_with_known_experts() -> None:
    rows = [json.loads(line) for line in HAND.read_text(encoding="utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) >= 60
    for row in rows:
        assert row["expert"] in FAMILIES and row["messages"][-1]["role"] == "user"
        assert sum(message["role"] == "user" for message in row["messages"]) >= 2


def _plain(template: str) -> str:
    """A template without case, signs, and what fills it."""
    return re.sub(r"\W+", " ", re.sub(r"\{.*?\}|\d+", "0", template.lower())).strip()
