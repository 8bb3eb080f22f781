"""Conversations of two to six user turns with the right expert of the last turn, by construction.

    python -m examples.zoo.conversations.generate --split test --n 640 > conversations.jsonl

A conversation starts with a prompt of one family. Each further turn is a follow-up on the current topic, or changes to
a prompt of another family, which is then the topic. The right expert is that of the topic of the last turn.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, Final

import typer

from examples.zoo.conversations import follow_ups as text
from examples.zoo.families import FAMILIES, Draw, Row, Split
from routers.base import Message

KINDS: Final = ("follow-up", "topic change")
MOST_TURNS: Final = 6
_SHARE_GENERIC: Final = 0.3
_SHARE_SYSTEM: Final = 0.4
_SHARE_REMINDER: Final = 0.25
_SHARE_REMINDER_ALONE: Final = 0.1
_SHARE_CHANGE_BEFORE: Final = 0.25
_ROWS: Final = 60
_MONTHS: Final = ("March", "June", "Oct", "December", "Jan", "August")
_UNITS: Final = ("kg", "km", "litres", "cm", "tonnes", "metres")
_GREETING: Final = "How can I help you today?"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation whose last turn waits for an answer.

    Attributes:
        kind: what the last turn is: "follow-up" or "topic change".
        expert: the right expert of the last turn. first: that of the first turn.
        harness: the conversation has a system prompt or a reminder of a harness.
    """

    id: str
    kind: str
    messages: tuple[Message, ...]
    expert: str
    first: str
    n_turns: int
    harness: bool

    def document(self) -> dict[str, Any]:
        """The conversation as a JSON object."""
        messages = [{"role": message.role, "content": message.content} for message in self.messages]
        return {
            "id": self.id,
            "kind": self.kind,
            "expert": self.expert,
            "first": self.first,
            "n_turns": self.n_turns,
            "harness": self.harness,
            "messages": messages,
        }


def conversations(split: Split, n: int, *, seed: int = 0) -> list[Conversation]:
    """`n` conversations with templates and words of a split; half of them end with a follow-up.

    The families and the numbers of turns (two to six) are drawn evenly. The same arguments always give the same ones.
    """
    rng = Random(f"conversations/{split}/{seed}")
    rows = {name: family.rows(split, _ROWS, seed=seed + 77) for name, family in FAMILIES.items()}
    return [_conversation(f"{split}-{seed}-{i:04d}", Draw(rng, split), rows, KINDS[i % 2]) for i in range(n)]


def _conversation(name: str, draw: Draw, rows: dict[str, list[Row]], kind: str) -> Conversation:
    rng = draw.rng
    n_turns = rng.randint(2, MOST_TURNS)
    topic = first = rng.choice(tuple(rows))
    messages: list[Message] = []
    system = rng.random() < _SHARE_SYSTEM
    if system:
        messages.append(Message("system", draw.pick(text.SYSTEMS)))
    if rng.random() < 0.05:  # some clients start with the assistant's greeting
        messages.append(Message("assistant", _GREETING))
    reminders = rng.random() < _SHARE_REMINDER
    row = rng.choice(rows[topic])
    prompt = row.prompt
    for turn in range(n_turns):
        last = turn == n_turns - 1
        if turn:
            changes = kind == "topic change" if last else rng.random() < _SHARE_CHANGE_BEFORE
            if changes:
                topic = rng.choice([name for name in rows if name != topic])
                row = rng.choice(rows[topic])
                prompt = draw.pick(text.TRANSITIONS).format(p=row.prompt)
            else:
                prompt = follow_up(draw, topic)
        messages.append(Message("user", f"{prompt}\n\n{draw.pick(text.REMINDERS)}" if reminders else prompt))
        if not last:
            messages.append(Message("assistant", row.answer))
    if reminders and kind == "follow-up" and rng.random() < _SHARE_REMINDER_ALONE:
        messages += [Message("assistant", row.answer), Message("user", draw.pick(text.REMINDERS))]
    return Conversation(name, kind, tuple(messages), topic, first, n_turns, system or reminders)


def follow_up(draw: Draw, topic: str) -> str:
    """A follow-up on a topic."""
    pool = text.GENERIC if draw.rng.random() < _SHARE_GENERIC else text.FOLLOW_UPS[topic]
    rng = draw.rng
    return draw.pick(pool).format(
        n=rng.randint(2, 95),
        d=f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1950, 2049)}",
        q=f"{rng.randint(2, 95)} {rng.choice(_UNITS)}",
        x=draw.pick(text.THINGS),
        name=draw.pick(text.NAMES),
        day=rng.choice(text.WEEKDAYS),
        f=draw.pick(text.FILES),
        w=draw.pick(text.WORDS),
    )


def main(
    split: Annotated[Split, typer.Option(help="Split of templates and words.")] = Split.TEST,
    n: Annotated[int, typer.Option(min=1, help="Number of conversations.")] = 640,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Write conversations as JSON lines."""
    for one in conversations(split, n, seed=seed):
        sys.stdout.write(json.dumps(one.document(), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
