"""What was read of a conversation, as JSON: in the decision log, in `/v1/route` and under `x-coe-debug`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import index
from typing import Any

from coe.protocol.decision import json_number
from routers.conversation import Weighed
from routers.decision import Switch, Utility


def turns_document(turns: Iterable[Weighed]) -> list[dict[str, Any]]:
    """The user turns that were read: the index of the message, its weight, and the probability that it stands alone."""
    return [
        {"message": turn.message, "weight": json_number(turn.weight), "alone": json_number(turn.alone)}
        for turn in turns
    ]


def turns_from(documents: Iterable[Mapping[str, Any]]) -> tuple[Weighed, ...]:
    """Inverse of `turns_document`. Raises KeyError, TypeError, ValueError."""
    return tuple(Weighed(index(turn["message"]), float(turn["weight"]), float(turn["alone"])) for turn in documents)


def switch_document(switch: Switch | None) -> dict[str, Any] | None:
    """The previous expert, and what leaving it costs: tokens to prefill again, with USD and seconds of each expert."""
    if switch is None:
        return None
    return {
        "previous": switch.previous,
        "tokens": switch.tokens,
        "cost_usd": {name: json_number(value) for name, value in switch.cost_usd.items()},
        "seconds": {name: json_number(value) for name, value in switch.seconds.items()},
    }


def switch_from(document: Mapping[str, Any] | None) -> Switch | None:
    """Inverse of `switch_document`. Raises KeyError, TypeError, ValueError, RouterError."""
    if document is None:
        return None
    usd, seconds = ({e: float(v) for e, v in document[name].items()} for name in ("cost_usd", "seconds"))
    return Switch(str(document["previous"]), index(document["tokens"]), usd, seconds)


def conversation_document(
    turns: Iterable[Weighed], switch: Switch | None, utility: Utility, experts: Iterable[str]
) -> dict[str, Any]:
    """What a decision took from the conversation: the turns, the previous expert, and the utility that others lose."""
    prices = {} if switch is None else {expert: switch.price(expert, utility) for expert in experts}
    return {
        "turns": turns_document(turns),
        "previous": None if switch is None else switch.previous,
        "prefill_tokens": 0 if switch is None else switch.tokens,
        "switch_price": {expert: json_number(price) for expert, price in prices.items()},
    }
