"""The expert of a conversation's previous turns, and the price of moving the conversation to another one.

Nothing is kept on the server: the previous expert is the one that the policy chooses for the conversation up to the
last user turn before the last answer, derived turn by turn from the same messages, or `Query.previous` where the caller
states it. An expert keeps the keys and values of a conversation that it answered; another one, also another adapter of
the same base, prefills it again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from registry.store import Snapshot
from routers.base import Message, Query
from routers.conversation import Read, Weighed, mix
from routers.decision import Switch, Utility, first_choices
from routers.errors import RouterError

PREFILL_TOKENS_PER_S: Final = 5_000.0
"""Prompt tokens per second of an expert whose speed is unknown: a model of 8B parameters on one busy GPU."""
PREFILL_PER_GENERATED: Final = 30.0
"""Prompt tokens per generated token in the same time, for an expert whose profile has its speed of generating: 29 to 33
for the two small models of the zoo at batch 1 on CPU; more on GPUs, so that the price is rather too high."""
BYTES_PER_TOKEN: Final = 4
TOKENS_PER_MESSAGE: Final = 4


@dataclass(frozen=True)
class Prices:
    """What a token of prompt costs at each expert."""

    snapshot: Snapshot

    @cached_property
    def usd_per_token(self) -> dict[str, float]:
        """Expert -> USD, of the experts with a price."""
        return {name: spec.price.input_usd_per_mtok / 1e6 for name, spec in self.snapshot.experts.items() if spec.price}

    @cached_property
    def seconds_per_token(self) -> dict[str, float]:
        """Expert -> seconds of prefill."""
        measured = {name: PREFILL_PER_GENERATED * rate for name, rate in self.snapshot.tokens_per_s.items()}
        return {name: 1.0 / measured.get(name, PREFILL_TOKENS_PER_S) for name in self.snapshot.experts}

    def switch(self, previous: str, tokens: int) -> Switch:
        """Moving a conversation of so many tokens away from `previous`."""
        usd = {name: each * tokens for name, each in self.usd_per_token.items()}
        return Switch(previous, tokens, usd, {name: each * tokens for name, each in self.seconds_per_token.items()})


def switches(
    queries: Sequence[Query],
    read: Read,
    utilities: Sequence[Utility],
    allowed: Sequence[Collection[str]],
    snapshot: Snapshot,
) -> list[Switch | None]:
    """The price of a switch for each of n queries; `None` where no turn has been answered, or switches are free.

    Args:
        read: the queries as the router read them.
        allowed: the experts that may answer each query; those of the last turn are taken for the previous ones.
    """
    prices = Prices(snapshot)
    chains = [
        _Chain(query, reading.turns, prices) if utility.switch_weight else None
        for query, reading, utility in zip(queries, read.readings, utilities, strict=True)
    ]
    step = 0
    while rows := [i for i, chain in enumerate(chains) if chain is not None and step < chain.n_steps]:
        moved = [chain.switch(step) for i in rows if (chain := chains[i]) is not None]
        try:
            chosen = first_choices(
                mix(read.turns, [read.readings[i].prefixes[step] for i in rows]),
                utility=[utilities[i] for i in rows],
                allowed=[allowed[i] for i in rows],
                switch=moved,
            )
        except RouterError:  # `decide` raises it for the query that has the problem
            return [None] * len(queries)
        for i, expert in zip(rows, chosen, strict=True):
            if (chain := chains[i]) is not None:
                chain.experts.append(expert)
        step += 1
    return [None if chain is None else chain.last() for chain in chains]


class _Chain:
    """The experts of the answered turns of one conversation, found one turn after the other.

    Attributes:
        n_steps: turns that were answered, as far as they are read; 0 if the caller states the previous expert.
        experts: of the turns so far.
    """

    def __init__(self, query: Query, turns: Sequence[Weighed], prices: Prices) -> None:
        self._query, self._prices = query, prices
        self.experts: list[str | None] = []
        self._answers = [i for i, message in enumerate(query.messages) if message.role == "assistant"]
        self._turns = [turn.message for turn in turns]
        answered = self._answers[-1] if self._answers and not query.raw else -1
        self.n_steps = 0 if query.previous else sum(message < answered for message in self._turns)

    def switch(self, step: int) -> Switch | None:
        """The price of a switch at a turn, given the experts of the turns before it."""
        return self._moved(self._turns[step]) if step else None

    def last(self) -> Switch | None:
        """The price of a switch at the answer that is asked for."""
        return self._moved(len(self._query.messages))

    def _moved(self, before: int) -> Switch | None:
        """From the expert of the last answer before a message."""
        answer = next((i for i in reversed(self._answers) if i < before), -1)
        if self._query.previous is not None:
            held = answer + 1 if answer >= 0 else _last_user(self._query.messages)
            return self._prices.switch(self._query.previous, tokens(self._query.messages[:held]))
        step = sum(message < answer for message in self._turns) - 1
        expert = self.experts[step] if 0 <= step < len(self.experts) else None
        return None if expert is None else self._prices.switch(expert, tokens(self._query.messages[: answer + 1]))


def tokens(messages: Sequence[Message]) -> int:
    """About how many tokens the messages are: a quarter of their bytes, and four a message."""
    n_bytes = sum(
        len(text) if (text := message.content).isascii() else len(text.encode("utf-8", "surrogatepass"))
        for message in messages
    )
    return n_bytes // BYTES_PER_TOKEN + TOKENS_PER_MESSAGE * len(messages)


def _last_user(messages: Sequence[Message]) -> int:
    return next((i for i in reversed(range(len(messages))) if messages[i].role == "user"), 0)
