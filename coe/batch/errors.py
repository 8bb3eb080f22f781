"""What can be wrong with a batch as a whole. What is wrong with one row is recorded in that row."""

from __future__ import annotations

from coe.errors import CoeError


class BatchError(CoeError, code="batch_failed"):
    """The batch cannot start or continue; the message says what to do."""


class InputError(BatchError, code="invalid_input"):
    """The input file cannot be read as JSONL or Parquet."""


class BudgetError(BatchError, code="invalid_budget"):
    """The rows cannot be assigned within the budget: too little money, or a policy that leaves no choice."""
