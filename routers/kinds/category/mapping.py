"""Category -> expert: the second half of Composition of Experts (arXiv 2412.01868), an integer programme.

The paper chooses a subset of experts and one of them a category, so that quality is highest within a budget of
parameters. It states the problem; the programme below is our reconstruction of it. With pi_m the share of category m,
w_mk the score of expert k in it, P_k its parameters or price, and binary a_mk (category m goes to k), z_k (k is kept):

    maximise    sum_mk pi_m w_mk a_mk
    subject to  sum_k a_mk = 1 for every m,  a_mk <= z_k,
    and         sum_k P_k z_k <= B              ("cumulative": all that is kept)
    or          sum_mk pi_m a_mk P_k <= B       ("average-active": what an average query uses)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from routers.errors import InvalidSettings, RouterError

BudgetKind = Literal["cumulative", "average-active"]
TOLERANCE = 1e-9
"""Relative slack on a budget, and the width within which two scores tie."""
SOLVER_SLACK = 1e-6
"""HiGHS' absolute tolerance: loss of scaled value that is accepted for a cheaper map of equal value."""
VALUE_SCALE = 1e3
"""Scale of the values: HiGHS' tolerance becomes 1e-9 in the scores."""

_Floats = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Budget:
    """At most `limit`, in the unit of the footprints it is compared with (parameters, or USD)."""

    limit: float
    kind: BudgetKind = "average-active"

    def __post_init__(self) -> None:
        if self.kind not in get_args(BudgetKind):
            raise InvalidSettings(
                f"budget kind {self.kind!r} does not exist; there are: {', '.join(get_args(BudgetKind))}"
            )
        if np.isnan(self.limit) or self.limit < 0:
            raise InvalidSettings(f"a budget must be a number >= 0, got {self.limit}")

    def admits(self, footprint: NDArray[Any] | float) -> Any:
        """Whether a footprint is within the limit, up to rounding."""
        return footprint <= self.limit * (1 + TOLERANCE)

    def used(self, choice: NDArray[np.intp], shares: _Floats, footprints: _Floats) -> float:
        """Budget that a map uses: `choice` (M,) is the expert of each category."""
        if self.kind == "cumulative":
            return float(footprints[np.unique(choice)].sum())
        return float(shares @ footprints[choice])


def map_categories(
    shares: ArrayLike, scores: ArrayLike, footprints: ArrayLike | None = None, budget: Budget | None = None
) -> NDArray[np.intp]:
    """The best expert of each category within the budget, by HiGHS; exact, not a relaxation.

    Args:
        shares: (M,) frequency of each category, positive; normalised to sum to 1.
        scores: (M, K) score of each expert in each category.
        footprints: (K,) parameters or price of each expert, >= 0. Required with a budget; without one they break ties.
        budget: `None` or an infinite limit gives the per-category argmax.

    Returns:
        (M,) expert indices. Ties go to the smallest footprint, then to the expert listed first.

    Raises:
        RouterError: arguments of a wrong shape or value, or a budget that no map meets (the message gives the smallest
            one that can be met).
    """
    pi, w, p = _checked(shares, scores, footprints)
    if budget is None or np.isinf(budget.limit):
        return _cheapest_argmax(w, p)
    if footprints is None:
        raise RouterError("a budget needs the footprint (parameters or price) of every expert")
    if not budget.admits(p.min()):
        raise RouterError(
            f"no map fits a {budget.kind} budget of {budget.limit:g}: the smallest that can be met is {p.min():g}, "
            "the footprint of the smallest expert"
        )
    unconstrained = _cheapest_argmax(w, p)
    if budget.kind == "average-active" and budget.admits(budget.used(unconstrained, pi, p)):
        return unconstrained
    return _solve(pi, w, p, budget)


def _checked(shares: ArrayLike, scores: ArrayLike, footprints: ArrayLike | None) -> tuple[_Floats, _Floats, _Floats]:
    pi, w = np.asarray(shares, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if w.ndim != 2 or not w.size or pi.shape != w.shape[:1]:
        raise RouterError(f"shares of shape {pi.shape} and scores of shape {w.shape}: expected (M,) and (M, K)")
    p = np.zeros(w.shape[1]) if footprints is None else np.asarray(footprints, dtype=np.float64)
    if p.shape != w.shape[1:]:
        raise RouterError(f"{p.size} footprints for {w.shape[1]} experts")
    if not (np.isfinite(pi).all() and (pi > 0).all() and np.isfinite(w).all()):
        raise RouterError("every category needs a positive share and finite scores")
    if not np.isfinite(p).all() or (p < 0).any():
        raise RouterError("footprints must be finite and >= 0")
    return pi / pi.sum(), w, p


def _cheapest_argmax(w: _Floats, p: _Floats) -> NDArray[np.intp]:
    tied = w >= w.max(axis=1, keepdims=True) - TOLERANCE
    return np.asarray(np.where(tied, p, np.inf).argmin(axis=1), dtype=np.intp)


def _solve(pi: _Floats, w: _Floats, p: _Floats, budget: Budget) -> NDArray[np.intp]:
    """Two programmes: the best value within the budget, then the smallest footprint at that value."""
    unit = p.max() or 1.0  # parameters come in billions: keep the solver's numbers near 1
    price, limit = p / unit, budget.limit / unit
    value = VALUE_SCALE * np.append((pi[:, None] * w).ravel(), np.zeros(p.size))
    average = np.append((pi[:, None] * price).ravel(), np.zeros(p.size))
    kept = np.append(np.zeros(w.size), price)
    spent = kept if budget.kind == "cumulative" else average
    best = _milp(-value, w.shape, [(spent, -np.inf, limit)])
    smallest = kept + average if budget.kind == "cumulative" else average
    as_good = float(value @ best) - SOLVER_SLACK
    cheaper = _milp(smallest, w.shape, [(spent, -np.inf, limit), (value, as_good, np.inf)])
    # Within the solver's tolerance the second map may lose value or the first exceed the budget: prefer the exact one.
    maps = [_choice(x, w.shape) for x in (cheaper, best)]
    fitting = [c for c in maps if budget.admits(budget.used(c, pi, p))]
    if not fitting:
        raise RouterError(f"the solver found no map within the {budget.kind} budget of {budget.limit:g}")
    top = max(_value(c, pi, w) for c in fitting)
    return next(c for c in fitting if _value(c, pi, w) >= top - TOLERANCE)


def _value(choice: NDArray[np.intp], pi: _Floats, w: _Floats) -> float:
    return float(pi @ w[np.arange(pi.size), choice])


def _choice(x: _Floats, shape: tuple[int, int]) -> NDArray[np.intp]:
    return np.asarray(x[: shape[0] * shape[1]].reshape(shape).argmax(axis=1), dtype=np.intp)


def _milp(objective: _Floats, shape: tuple[int, int], rows: list[tuple[_Floats, float, float]]) -> _Floats:
    """Minimise over x = (a_11 .. a_MK, z_1 .. z_K), binary, under the assignment constraints and `rows`."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    one_each, kept = _assignment(*shape)
    constraints: list[Any] = [LinearConstraint(one_each, 1, 1), LinearConstraint(kept, -np.inf, 0)]
    constraints += [LinearConstraint(row[None, :], low, high) for row, low, high in rows]
    result = milp(
        objective,
        integrality=np.ones(objective.size),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RouterError(f"the category map could not be solved: {result.message}")
    return np.asarray(result.x, dtype=np.float64).round()


def _assignment(m: int, k: int) -> tuple[Any, Any]:
    """Sparse rows of `sum_k a_mk` (M of them) and of `a_mk - z_k` (M * K of them)."""
    from scipy.sparse import eye_array, hstack, kron

    ones_each = kron(eye_array(m), np.ones((1, k)))
    spread = kron(np.ones((m, 1)), eye_array(k))
    no_z = np.zeros((m, k))
    return hstack([ones_each, no_z], format="csr"), hstack([eye_array(m * k), -spread], format="csr")
