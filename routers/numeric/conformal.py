"""Thresholds with a guarantee: split-conformal abstention and conformal risk control. Pure functions.

Both use n calibration queries that the model was not fitted on, and hold in finite samples for any model, as long as
calibration queries and new queries are exchangeable (any order of them is equally likely). The guarantee is on average
over calibration sets and queries, and does not extend to queries from another distribution.

    conformal   P(score(x) > q) <= alpha                    with q = conformal_threshold(scores, alpha)
    risk        E[1{confidence(x) > t} * loss(x)] <= alpha  with t = risk_threshold(confidence, losses, alpha)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routers.errors import RouterError

_Floats = NDArray[Any]


def conformal_threshold(scores: _Floats, alpha: float) -> float:
    """The ceil((1 - alpha) (n + 1))-th smallest of n nonconformity scores: a new one exceeds it in at most alpha.

    Split-conformal prediction (arXiv 2107.07511, section 1). With distinct scores the share that exceeds it is above
    alpha - 1 / (n + 1), so the bound is nearly tight; ties lower the share. Infinity where alpha < 1 / (n + 1).
    """
    _check(alpha, scores)
    rank = math.ceil((1 - alpha) * (len(scores) + 1) - 1e-9)  # 1e-9: 0.95 * 20 is 19, and floats round it up to 20
    return float(np.sort(scores)[max(rank, 1) - 1]) if rank <= len(scores) else math.inf


def conformal_p(scores: _Floats, new: _Floats) -> NDArray[np.float64]:
    """(k,) p-values of k new scores: (1 + #{calibration scores >= new}) / (n + 1), each at most u in a share u."""
    ordered = np.sort(scores)
    return (1 + len(ordered) - np.searchsorted(ordered, new, side="left")) / (len(ordered) + 1)


def risk_threshold(confidence: _Floats, losses: _Floats, alpha: float) -> float:
    """The lowest t with (n R(t) + 1) / (n + 1) <= alpha, where R(t) = mean of 1{confidence > t} * loss.

    Conformal risk control (arXiv 2208.02814, theorem 1) for the loss "answered, and wrong": L(t) = 1{confidence > t}
    (1 - score) lies in [0, 1], falls in t and is continuous from the right, so that E[L(t)] <= alpha for a new query.
    Minus infinity, which answers everything, where that keeps the risk below alpha.

    Args:
        confidence: (n,) of the decisions; losses: (n,) 1 - score of the chosen expert, in [0, 1].

    Raises:
        RouterError: alpha < 1 / (n + 1): no threshold meets the bound, not even one that answers nothing.
    """
    _check(alpha, confidence)
    n = len(confidence)
    allowed = alpha * (n + 1) - 1
    if allowed < -1e-9:
        raise RouterError(
            f"a risk of {alpha} cannot be guaranteed by {n} calibration queries: at least {math.ceil(1 / alpha) - 1} "
            "are needed (give more rows, a larger calibration_share, or a larger alpha)"
        )
    order = np.argsort(-confidence, kind="stable")
    total = np.cumsum(losses[order])  # of the k + 1 most confident
    fits = np.append(True, total <= allowed + 1e-9)  # of the k most confident; falls from True to False once
    answered = len(fits) - 1 - int(np.argmax(fits[::-1]))
    return -math.inf if answered == n else float(confidence[order[answered]])


def _check(alpha: float, scores: _Floats) -> None:
    if not 0 < alpha < 1:
        raise RouterError(f"alpha must lie between 0 and 1, got {alpha}")
    if not len(scores):
        raise RouterError("there are no calibration queries: a threshold needs some")
