"""RecentDecisions: the last decisions of a gateway in memory, for `GET /admin/decisions`, without texts.

A record has what the decision cost, and what two other experts would have cost by the same estimate: the most expensive
one that was allowed, and the best single expert of the policy's router (the best mean score on its training table).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from itertools import islice
from typing import Any, Final

from coe.routing import Routed
from coe.serve.http.finished import Finished

KEPT: Final = 1000
"""Decisions that a gateway keeps; about 1 KiB each."""
Record = Mapping[str, Any]
Pages = Callable[[int], Awaitable[Sequence[Sequence[Record]]]]
"""The last decisions of each gateway that responds, the calling one included."""


class RecentDecisions:
    """The last decisions of this process, and of all gateways together.

    Args:
        kept: most decisions.
        pages: those of every gateway; None if this process is the only one.
    """

    def __init__(self, kept: int = KEPT, *, pages: Pages | None = None) -> None:
        self._records: deque[Record] = deque(maxlen=kept)
        self._pages = pages

    def write(self, finished: Finished) -> None:
        """Keep what a finished request decided. One that was refused before its decision is kept with its error."""
        self._records.append(record_of(finished))

    def last(self, count: int) -> list[Record]:
        """The last decisions of this process, the newest first."""
        return list(islice(reversed(self._records), count))

    async def of_all(self, count: int) -> tuple[int, list[Record]]:
        """The number of gateways that responded, and the last decisions of all of them, the newest first."""
        if self._pages is None:
            return 1, self.last(count)
        pages = await self._pages(count)
        records = [record for page in pages for record in page]
        return len(pages), sorted(records, key=lambda record: record["time"], reverse=True)[:count]


def record_of(finished: Finished) -> Record:
    """What is kept of a request; numbers that are not known or not finite are None."""
    routed, answer = finished.routed, finished.answer
    decision = routed.decision if routed else None
    return {
        "id": finished.id,
        "time": finished.started_at,
        "endpoint": finished.endpoint,
        "key": finished.key,
        "policy": routed.policy.name if routed and routed.policy else None,
        "expert": finished.expert,
        "chosen": list(decision.experts[:8]) if decision else [],
        "confidence": _finite(decision.confidence) if decision else None,
        "label": decision.label if decision else None,
        "abstained": decision is not None and decision.abstained,
        "fallback": decision is not None and decision.fallback,
        "status": finished.status,
        "error": finished.error,
        "calls": len(finished.done),
        "cost_usd": None if answer is None else _finite(answer.cost_usd),
        "first_s": finished.first_s,
        "total_s": finished.total_s,
        "estimated": _estimated(routed, {each.expert for each in finished.done.values()}) if routed else None,
    }


def _estimated(routed: Routed, called: Collection[str]) -> Record | None:
    """USD by the estimate of the decision: of the experts that were called, and of the two baselines."""
    inputs, best = routed.inputs, routed.policy.best_single if routed.policy else None
    if inputs is None or inputs.estimate.cost_usd is None:
        return None
    row = inputs.estimate.cost_usd[0]
    costs = {
        name: float(usd) for name, usd in zip(inputs.estimate.experts, row.tolist(), strict=True) if math.isfinite(usd)
    }
    allowed = [name for name in costs if name in inputs.allowed]
    most = max(allowed, key=costs.__getitem__, default=None)
    return {
        "cost_usd": sum(costs[name] for name in called) if called and costs.keys() >= set(called) else None,
        "most_expensive": None if most is None else {"expert": most, "cost_usd": costs[most]},
        "best_single": None if best not in costs else {"expert": best, "cost_usd": costs[best]},
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
