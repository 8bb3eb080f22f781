"""The budget of a batch whose rows are assigned jointly: what it limits, which policies can, and what a row would cost.

A row is priced as `coe plan` prices it: prompt tokens estimated from its text, and new tokens by the mean length of the
expert's answers where that is known, else by the most that the request allows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from coe.batch.errors import BudgetError
from coe.compose import Single
from coe.policy import Always, Policy
from registry.errors import UnknownExpert
from registry.spec import RESERVED_PREFIX
from registry.store import Snapshot
from routers.constraints import context_length
from routers.selectors import TopK


@dataclass(frozen=True, slots=True)
class Budget:
    """What the experts of all rows are chosen within.

    Attributes:
        usd: most predicted USD of all calls.
        capacity: expert -> most rows.
        load_weight: predicted right answers given up for each GiB of weights that is loaded.
        mean_tokens: expert -> mean new tokens of its answers, where known.

    Raises:
        BudgetError: a number is negative or not finite.
    """

    usd: float
    capacity: Mapping[str, int] = field(default_factory=dict)
    load_weight: float = 0.0
    mean_tokens: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("budget", self.usd), ("load weight", self.load_weight)):
            if not (math.isfinite(value) and value >= 0):
                raise BudgetError(f"the {name} must be a finite number >= 0, got {value}")
        for name, rows in self.capacity.items():
            if rows < 0:
                raise BudgetError(f"the capacity of {name!r} must be >= 0, got {rows}")

    def manifest(self) -> dict[str, Any]:
        """What makes it another run; the lengths of answers are kept with the run (`kept`)."""
        return {"usd": self.usd, "capacity": dict(sorted(self.capacity.items())), "load_weight": self.load_weight}

    def kept(self, run: dict[str, Any]) -> Self:
        """The budget with the answer lengths that the run was started with; they are recorded in `run` if it is new."""
        return replace(self, mean_tokens=run.setdefault("mean_tokens", dict(sorted(self.mean_tokens.items()))))

    def check(self, snapshot: Snapshot) -> None:
        """Raise BudgetError where a capacity names an expert that is not registered."""
        for name in self.capacity:
            if name not in snapshot.experts:
                raise BudgetError(f"capacity: {UnknownExpert(name, snapshot.experts)}")


def check_policy(policy: Policy, policies: Collection[Policy]) -> None:
    """Raise BudgetError where the rows of a policy cannot be assigned; the message names the policies that can."""
    why = _refusal(policy)
    if why is None:
        return
    able = [RESERVED_PREFIX + each.name for each in policies if _refusal(each) is None and _scores(each)]
    others = f"of the policies, {', '.join(able)} can (--model)" if able else "no configured policy can"
    raise BudgetError(
        f"policy {policy.name!r} cannot be assigned within a budget: {why}. It takes a router that scores every "
        f"expert, and a composition that calls one of them; {others}"
    )


def _refusal(policy: Policy) -> str | None:
    """Why not. A policy that names one expert has no choice: its rows are priced."""
    if not isinstance(policy.composition, Single):
        return f"its composition, {type(policy.composition).__name__.lower()}, may call several experts for a row"
    if not _scores(policy):
        return None
    if not isinstance(policy.select, TopK) or policy.select.k != 1:
        return f"its selector, {policy.select.kind}, may choose several experts for a row"
    return None


def _scores(policy: Policy) -> bool:
    return not isinstance(policy.router, Always)


class Prices:
    """Predicted USD of rows by expert.

    Raises:
        BudgetError: (from `usd`) the expert has no price.
    """

    def __init__(self, snapshot: Snapshot, mean_tokens: Mapping[str, float]) -> None:
        self._snapshot, self._mean_tokens = snapshot, mean_tokens
        self._contexts: dict[str, int | None] = {}

    def usd(self, expert: str, prompt_tokens: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n,) USD of n rows, by their prompt tokens and the most new tokens that they allow."""
        price = self._snapshot.experts[expert].price
        if price is None:
            raise BudgetError(
                f"{expert!r} has no price, so no budget can hold for it: give it `price` in the experts file "
                "(0 where its calls cost nothing)"
            )
        if expert not in self._contexts:
            self._contexts[expert] = context_length(self._snapshot.experts[expert], self._snapshot.experts)
        tokens = most_new_tokens(wanted, prompt_tokens, self._contexts[expert])
        tokens = np.minimum(tokens, self._mean_tokens.get(expert, np.inf))
        usd = prompt_tokens * price.input_usd_per_mtok + tokens * price.output_usd_per_mtok
        return np.asarray(usd / 1e6, dtype=np.float64)


def most_new_tokens(
    wanted: NDArray[np.float64], prompt_tokens: NDArray[np.float64], context: int | None
) -> NDArray[np.float64]:
    """(n,) largest numbers of new tokens: those wanted, or what the prompts leave of the context, at least 1."""
    if context is None:
        return wanted
    return np.where(prompt_tokens + wanted <= context, wanted, np.maximum(1.0, context - prompt_tokens))
