"""What can be wrong with a batch as a whole. What is wrong with one row is recorded in that row."""

from __future__ import annotations

from coe.errors import CoeError


class BatchError(CoeError):
    """The batch cannot start or continue; the message says what to do."""

    code = "batch_failed"


class InputError(BatchError):
    """The input file cannot be read as JSONL or Parquet."""

    code = "invalid_input"
