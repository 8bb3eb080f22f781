"""estimate: a router's estimate of conversations, in one call of the router.

Router-agnostic: each user turn is a query of its own, and the estimates are mixed (`routers.conversation.turns`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from routers.base import Estimate, Floats, Message, Query, Router
from routers.conversation.turns import Reads, Turn, Weighed, dependence, prefix_weights, turns_of

SEEN: Final = 0.1
"""A turn of less weight does not make the estimate `truncated`."""
Mixture = tuple[slice, NDArray[np.float64]]
"""Rows of an estimate of turns, with the weight of each."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read of one query.

    Attributes:
        turns: the user turns, the oldest first.
        prefixes: what the router's estimate of the conversation up to each turn is mixed from; the last is the query's.
    """

    turns: tuple[Weighed, ...]
    prefixes: tuple[Mixture, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """n queries as a router read them.

    Attributes:
        estimate: n rows. turns: a row for each user turn of all queries. readings: n.
    """

    estimate: Estimate
    turns: Estimate
    readings: tuple[Reading, ...]


def estimate(router: Router, queries: Sequence[Query], reads: Reads = "conversation") -> Estimate:
    """The router's estimate of n queries, conversations included."""
    return read(router, queries, reads).estimate


def read(router: Router, queries: Sequence[Query], reads: Reads = "conversation") -> Read:
    """The router's estimate of n queries, and what was read of each. The router is called once."""
    found = [turns_of(query, reads) for query in queries]
    asked = [_alone(query, turn) for query, turns in zip(queries, found, strict=True) for turn in turns]
    of_turns = router.estimate(asked)
    readings = []
    start = 0
    for query, turns in zip(queries, found, strict=True):
        rows = slice(start, start := start + len(turns))
        if query.embeds:
            readings.append(_side_by_side(turns, rows))
        else:
            readings.append(_reading(turns, rows, None if of_turns.ood is None else of_turns.ood[rows]))
    if len(asked) == len(queries):
        return Read(of_turns, of_turns, tuple(readings))
    mixtures = [reading.prefixes[-1] for reading in readings]
    leading = [
        _of_majority(of_turns, rows) if query.embeds else rows.start + int(weights.argmax())
        for query, (rows, weights) in zip(queries, mixtures, strict=True)
    ]
    return Read(mix(of_turns, mixtures, leading), of_turns, tuple(readings))


def mix(of_turns: Estimate, mixtures: Sequence[Mixture], leading: Sequence[int] | None = None) -> Estimate:
    """One row for each mixture. Numbers are weighted means; what is no number is that of the turn that leads.

    The confidence of a mixture counts the turns that would choose the same expert.

    Args:
        leading: the row of `of_turns` that leads each mixture; by default that of the largest weight.
    """
    if leading is None:
        leading = [rows.start + int(weights.argmax()) for rows, weights in mixtures]
    most = np.array(leading, dtype=np.intp)
    quality = _mean(of_turns.quality, mixtures)
    eligible = None if of_turns.eligible is None else of_turns.eligible[most]
    return Estimate(
        of_turns.experts,
        quality,
        cost_usd=None if of_turns.cost_usd is None else _mean(of_turns.cost_usd, mixtures),
        ood=None if of_turns.ood is None else _mean(of_turns.ood, mixtures),
        labels=None if of_turns.labels is None else tuple(of_turns.labels[row] for row in most),
        eligible=eligible,
        abstained=None if of_turns.abstained is None else of_turns.abstained[most],
        confidence=_confidence(of_turns, mixtures, _choices(quality, eligible)),
        reasons=None if of_turns.reasons is None else _reasons(of_turns.reasons, mixtures, most),
        truncated=None if of_turns.truncated is None else _truncated(of_turns.truncated, mixtures),
        weights=None if of_turns.weights is None else _mean(of_turns.weights, mixtures),
    )


def _alone(query: Query, turn: Turn) -> Query:
    """The query of one turn; the query itself if that is all it says."""
    if turn.text == query.text and turn.message == _last_user(query):
        return query
    return replace(query, messages=(Message("user", turn.text),))


def _last_user(query: Query) -> int:
    return next((i for i in reversed(range(len(query.messages))) if query.messages[i].role == "user"), 0)


def _reading(turns: Sequence[Turn], rows: slice, ood: Floats | None) -> Reading:
    p = dependence([turn.text for turn in turns], ood)
    prefixes = prefix_weights(p)
    weighed = (
        Weighed(turn.message, float(weight), 1.0 - depends)
        for turn, weight, depends in zip(turns, prefixes[-1], p, strict=True)
    )
    mixtures = ((slice(rows.start, rows.start + len(weights)), weights) for weights in prefixes)
    return Reading(tuple(weighed), tuple(mixtures))


def _side_by_side(turns: Sequence[Turn], rows: slice) -> Reading:
    """Texts to embed: the mean of the estimates of all. No turn precedes another one, so there is one prefix."""
    weights = np.full(len(turns), 1.0 / len(turns))
    return Reading(tuple(Weighed(turn.message, 1.0 / len(turns), 1.0) for turn in turns), ((rows, weights),))


def _of_majority(of_turns: Estimate, rows: slice) -> int:
    """The first of these rows whose expert is that of most of them: of texts to embed, none weighs more."""
    eligible = None if of_turns.eligible is None else of_turns.eligible[rows]
    chosen = _choices(of_turns.quality[rows], eligible)
    return int(rows.start + (chosen == np.bincount(chosen).argmax()).argmax())


def _mean(values: Floats, mixtures: Sequence[Mixture]) -> Floats:
    """Weighted means of rows. A single row stays as it is, bit for bit."""
    return np.stack([values[rows.start] if len(weights) == 1 else weights @ values[rows] for rows, weights in mixtures])


def _choices(quality: Floats, eligible: NDArray[np.bool_] | None) -> NDArray[np.intp]:
    """(n,) the column that a row chooses by quality."""
    open_to = np.where(np.isnan(quality) if eligible is None else np.isnan(quality) | ~eligible, -np.inf, quality)
    return np.asarray(open_to.argmax(axis=1), dtype=np.intp)


def _confidence(of_turns: Estimate, mixtures: Sequence[Mixture], chosen: NDArray[np.intp]) -> Floats | None:
    if of_turns.confidence is None:
        return None
    own = _choices(of_turns.quality, of_turns.eligible)
    found = [
        of_turns.confidence[rows.start]
        if len(weights) == 1
        else weights @ np.where(own[rows] == choice, of_turns.confidence[rows], 0.0)
        for (rows, weights), choice in zip(mixtures, chosen, strict=True)
    ]
    return np.array(found, dtype=of_turns.confidence.dtype)


def _reasons(reasons: tuple[str, ...], mixtures: Sequence[Mixture], most: NDArray[np.intp]) -> tuple[str, ...]:
    found = []
    for (rows, weights), row in zip(mixtures, most, strict=True):
        turn = int(row) - rows.start + 1
        other = reasons[row] != reasons[rows.start + len(weights) - 1]
        found.append(f"by user turn {turn} of the {len(weights)} read: {reasons[row]}" if other else reasons[row])
    return tuple(found)


def _truncated(truncated: NDArray[np.bool_], mixtures: Sequence[Mixture]) -> NDArray[np.bool_]:
    """Whether a turn of some weight is truncated; where all weigh little, as many texts to embed do, any of them."""
    return np.array(
        [bool((truncated[rows] & (weights >= min(SEEN, weights.max()))).any()) for rows, weights in mixtures],
        dtype=bool,
    )
