"""What is known of an answer while it comes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Answering:
    """One answer while it comes.

    Attributes:
        expert: who answers, from the first text on. text: what came so far.
        why: the decision and the estimate that it was made from, as `coe.protocol.responses.route_body` has them,
            with `asked` (the experts that were called), `notes`, `cost_usd` and `tokens`; empty before the end.
    """

    expert: str | None = None
    text: str = ""
    why: dict[str, Any] = field(default_factory=dict)
