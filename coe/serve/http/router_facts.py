"""What is known of the router of a policy: its training table, its weights, and its saved curve."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from coe.policy import Always, Policy
from routers.errors import RouterError
from routers.evaluation.saved_curve import AGAIN, read_curve
from routers.selectors import selector_document

MOST_EXPERTS: Final = 200
"""Experts of a router that are listed: those of the highest mean score."""
logger = logging.getLogger(__name__)


def router_document(policy: Policy) -> Mapping[str, Any]:
    """The router of a policy; reads its curve from the disk."""
    meta, weights = policy.trained, policy.utility
    curve, problem = _curve(policy)
    return {
        "policy": policy.name,
        "cost_weight": weights.cost_weight,
        "latency_weight": weights.latency_weight,
        "switch_weight": weights.switch_weight,
        "select": selector_document(policy.select),
        "composition": type(policy.composition).__name__,
        "fallback": policy.fallback,
        "best_single": policy.best_single,
        "expert": policy.router.expert if isinstance(policy.router, Always) else None,
        "router": None
        if meta is None
        else {
            "kind": meta.kind,
            "digest": meta.digest,
            "created": meta.created,
            "encoder": None if meta.encoder is None else meta.encoder.name,
            "n_queries": meta.n_queries,
            "solved": meta.solved,
            "experts": _mean_scores(policy),
        },
        "curve": curve,
        "curve_problem": problem,
    }


def _mean_scores(policy: Policy) -> list[Mapping[str, Any]]:
    """The mean score of each expert on the training table, the best first."""
    assert policy.trained is not None
    reference = policy.trained.reference
    scored = sorted(zip(reference.experts, reference.mean_scores.tolist(), strict=True), key=lambda pair: -pair[1])
    return [{"name": name, "mean_score": score} for name, score in scored[:MOST_EXPERTS]]


def _curve(policy: Policy) -> tuple[Mapping[str, Any] | None, str | None]:
    """The saved curve, or why there is none."""
    if isinstance(policy.router, Always):
        return None, "the policy names one expert, so there is nothing to trade"
    if policy.folder is None or policy.trained is None:
        return None, "the router of this policy was not loaded from a folder"
    try:
        curve = read_curve(policy.folder, policy.trained.digest)
    except RouterError as error:
        logger.warning("the curve of policy %r: %s", policy.name, error)
        return None, str(error)
    if curve is None:
        return None, f"no curve is stored with this router: {AGAIN}, on rows that it was not trained on"
    return curve.model_dump(), None
