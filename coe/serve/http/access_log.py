"""The access log: one line for each prompt of a request, as fields (`serve.log_format: json`). No texts, no keys."""

from __future__ import annotations

import logging
from typing import Any, Final

from coe.serve.http.finished import Finished

MOST_MODEL: Final = 128
"""Most characters of `model`, which the client has sent."""
logger = logging.getLogger("coe.access")


def write(finished: Finished) -> None:
    """Write the line of a finished request."""
    usage = finished.answer.usage if finished.answer else None
    fields: dict[str, Any] = {
        "decision_id": finished.id,
        "endpoint": finished.endpoint[:MOST_MODEL],
        "model": finished.model[:MOST_MODEL],
        "expert": finished.expert,
        "policy": finished.routed.policy.name if finished.routed and finished.routed.policy else None,
        "status": finished.status,
        "error": finished.error,
        "streamed": finished.streamed,
        "seconds": round(finished.total_s, 6),
        "first_token_s": None if finished.first_s is None else round(finished.first_s, 6),
        "prompt_tokens": usage and usage.prompt_tokens,
        "completion_tokens": usage and usage.completion_tokens,
    }
    logger.info("request", extra={"fields": {name: value for name, value in fields.items() if value is not None}})
