"""A simulated day of sessions: what a price of switching saves, and what quality it costs.

Deterministic. Six experts, one for each of five topics and a general one; on each topic a neighbour and the general
expert are nearly as good as the specialist, and the router's estimate of each turn has noise. Sessions have 1 to 12
turns; a topic stays for five turns on average; answers are 50 to 4,000 tokens long, and one prompt in ten pastes a
document of 6,000. The policy decides through `coe.routing.route`, which derives the previous expert from the messages;
what is counted is what the experts' caches hold: an expert that did not answer the last turn prefills the conversation
again.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from coe.policy import Policy
from coe.routing import Routed, route
from coe.switching import PREFILL_TOKENS_PER_S, tokens
from registry.spec import ExpertSpec, Kind, Price
from registry.store import Snapshot
from routers.base import Estimate, Message, Query
from routers.decision import Utility

TOPICS = ("sql", "code", "math", "letters", "support")
EXPERTS = (*TOPICS, "general")
SPECIALIST, NEIGHBOUR, GENERAL, OTHER = 0.86, 0.82, 0.80, 0.40
NOISE = 0.05
"""Standard deviation of the router's estimate."""
WEIGHTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
DEFAULT = 0.05
N_SESSIONS = 400
MOST_TURNS = 12
FOLLOW_UPS = ("and the next one?", "now the same for the other one", "make that shorter", "why is that?", "yes, do it")


@dataclass
class Session:
    """A session in progress."""

    topics: list[str]
    prompts: list[str]
    answers: list[str]
    messages: list[Message] = field(default_factory=list)
    holder: str | None = None


class Simulated:
    """A router that knows the topic of a complete prompt, with noise; a follow-up alone is out of distribution."""

    requires: frozenset[str] = frozenset()

    def estimate(self, queries: Sequence[Query]) -> Estimate:
        quality, ood = [], []
        for query in queries:
            topic = next((topic for topic in TOPICS if query.text.startswith(f"[{topic}]")), None)
            rng = np.random.default_rng(zlib.crc32(query.text.encode()))
            means = [0.5] * len(EXPERTS) if topic is None else [true_quality(topic, expert) for expert in EXPERTS]
            quality.append(np.clip(rng.normal(means, NOISE), 0, 1))
            ood.append(1.0 if topic is None else 0.3)
        return Estimate(EXPERTS, np.array(quality), ood=np.array(ood))


def true_quality(topic: str, expert: str) -> float:
    """Expected score of an expert's answers on a topic."""
    neighbour = TOPICS[(TOPICS.index(topic) + 1) % len(TOPICS)]
    return {topic: SPECIALIST, neighbour: NEIGHBOUR, "general": GENERAL}.get(expert, OTHER)


def sessions(seed: int = 0) -> list[Session]:
    """The sessions of the day: their prompts and answers."""
    rng = Random(seed)
    return [_session(rng, i) for i in range(N_SESSIONS)]


def _session(rng: Random, number: int) -> Session:
    topic, found = rng.choice(TOPICS), Session([], [], [])
    for turn in range(rng.randint(1, MOST_TURNS)):
        changes = turn > 0 and rng.random() < 0.2
        topic = rng.choice([other for other in TOPICS if other != topic]) if changes else topic
        complete = turn == 0 or changes or rng.random() < 0.5
        text = f"[{topic}] Please work on item {number}-{turn} of the list that I keep for this project."
        document = " word" * 6_000 if complete and rng.random() < 0.1 else ""
        found.prompts.append(text + document if complete else rng.choice(FOLLOW_UPS))
        found.topics.append(topic)
        found.answers.append("text" * min(4_000, max(50, int(rng.lognormvariate(math.log(400), 0.9)))))
    return found


@dataclass
class Day:
    """What a day cost. tokens_again: prefilled by an expert that did not hold the conversation."""

    turns: int = 0
    switches: int = 0
    tokens_again: int = 0
    tokens: int = 0
    usd: float = 0.0
    quality: float = 0.0


def simulate(switch_weight: float, *, stated: bool = False, sticky: bool = False) -> Day:
    """Run the day under a switch weight; turn t of all sessions is decided in one batch.

    stated: the client states the previous expert (`coe.session.expert`). sticky: the expert of the first turn answers
    all others too.
    """
    price = Price(input_usd_per_mtok=1.0, output_usd_per_mtok=4.0)
    specs = {e: ExpertSpec(name=e, kind=Kind.MODEL, source="fake://echo", price=price) for e in EXPERTS}
    policy = Policy("day", Simulated(), utility=Utility(switch_weight=switch_weight))
    day, running = Day(), sessions()
    for turn in range(MOST_TURNS):
        running = [one for one in running if turn < len(one.prompts)]
        for one in running:
            one.messages.append(Message("user", one.prompts[turn]))
        queries = [Query(tuple(one.messages), previous=one.holder if stated else None) for one in running]
        for one, outcome in zip(running, route(queries, policy, Snapshot(1, specs), {}), strict=True):
            assert isinstance(outcome, Routed)
            _count(day, one, one.holder if sticky and one.holder else outcome.decision.experts[0], turn)
    return day


def _count(day: Day, one: Session, expert: str, turn: int) -> None:
    held = one.messages[:-1]
    again = tokens(held) if one.holder not in (None, expert) else 0
    new, answer = tokens(one.messages[-1:]), Message("assistant", one.answers[turn])
    day.turns += 1
    day.switches += again > 0
    day.tokens_again += again
    day.tokens += again + new
    day.usd += (again + new) * 1e-6 + tokens([answer]) * 4e-6
    day.quality += true_quality(one.topics[turn], expert)
    one.holder = expert
    one.messages.append(answer)


def print_sessions() -> None:
    """A markdown table, one line per switch weight."""
    print("| switch_weight | switches | tokens prefilled again | prefill s a turn | USD | quality |")
    print("|---:|---:|---:|---:|---:|---:|")
    for weight in WEIGHTS:
        print_day(f"{weight:g}" + " (default)" * (weight == DEFAULT), simulate(weight))
    print_day(f"{DEFAULT:g}, previous expert stated", simulate(DEFAULT, stated=True))
    print_day("sticky", simulate(0.0, sticky=True))


def print_day(name: str, day: Day) -> None:
    """A line of the table."""
    seconds = day.tokens / day.turns / PREFILL_TOKENS_PER_S
    print(
        f"| {name} | {day.switches / day.turns:.1%} | {day.tokens_again:,} | {seconds:.3f} | {day.usd:.2f} "
        f"| {day.quality / day.turns:.4f} |",
        flush=True,
    )
