"""Results: one record for each row, merged from sorted parts into one sorted file, a few rows of each part at a time.

They do not depend on when, where or in how many pieces a row was answered.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from coe.batch.openai_lines import batch_line
from coe.batch.pieces import TOOL_CALLS, result_columns
from coe.batch.records import OUTCOME, RoutedRow, describe, duplicate_id, outcome_columns
from coe.protocol.responses import answers_body
from coe.runs.storage import Folder
from coe.types import Answer, Failure

RESULTS_FILE, LINES_FILE = "results.parquet", "results.jsonl"
RUN_ROWS = 128
"""Rows of each sorted run that a merge holds in memory."""
FAN_IN = 64
"""Parts that are merged at once; more take several rounds."""
_FINAL_ROWS = 8192

_ERROR = pa.struct([("message", pa.string()), ("type", pa.string()), ("param", pa.string()), ("code", pa.string())])
_USAGE = pa.struct(
    [
        *((name, pa.int32()) for name in ("prompt_tokens", "completion_tokens", "total_tokens")),
        ("estimated", pa.bool_()),
    ]
)
_ANSWERS = pa.list_(
    pa.struct(
        [
            ("call", pa.string()),
            ("expert", pa.string()),
            ("text", pa.string()),
            ("tool_calls", TOOL_CALLS),
            ("finish_reason", pa.string()),
            ("usage", _USAGE),
            ("cost_usd", pa.float64()),
            ("error", _ERROR),
        ]
    )
)
FINAL = pa.schema(
    [
        ("id", pa.string()),
        ("line", pa.int64()),
        ("model", pa.string()),
        ("policy", pa.string()),
        ("expert", pa.string()),
        ("answer", pa.string()),
        ("reasoning", pa.string()),
        ("tool_calls", TOOL_CALLS),
        *OUTCOME,
        ("confidence", pa.float64()),
        ("label", pa.string()),
        ("reason", pa.string()),
        ("truncated", pa.bool_()),
        ("notes", pa.list_(pa.string())),
        ("answers", _ANSWERS),
        ("error", _ERROR),
    ]
)
"""results.parquet: for each row the requested model, the expert, its answer and the decision; or the error.

`reasoning`, `tool_calls`: of the answer, null without any. `truncated`: the router read only the beginning of the
prompt. `notes`: which experts failed, what was cut. `answers`:
one for each expert call, if the row requests them, as in the field `coe` of the endpoint."""
RESULTS = pa.schema(
    [
        *FINAL,
        ("status", pa.int32()),
        ("endpoint", pa.string()),
        ("logprobs", pa.string()),
        ("prompt_logprobs", pa.string()),
    ]
)
"""A part of it, with the columns that only results.jsonl needs."""

Result = dict[str, Any]
_NOTHING: Mapping[str, Answer | Failure] = MappingProxyType({})
_NOTE = b"coe"


@dataclass(slots=True)
class Counts:
    """Counts of results, by the expert that answered and by the code of the error."""

    rows: int = 0
    experts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0

    def add(self, record: Result) -> None:
        """Count one result."""
        self.rows += 1
        if record["error"] is not None:
            self.errors[record["error"]["code"] or "unknown"] += 1
            return
        self.experts[record["expert"]] += 1
        self.prompt_tokens += record["prompt_tokens"]
        self.completion_tokens += record["completion_tokens"]
        self.cost_usd += record["cost_usd"] or 0.0


def result(
    row: RoutedRow,
    outcome: Answer | Exception | None,
    done: Mapping[str, Answer | Failure] = _NOTHING,
    logged_as: str | None = None,
) -> Result:
    """The result of a row. Without an outcome, the row has an error.

    Args:
        done: the outcomes of its calls.
        logged_as: as in `records.describe`.
    """
    record: Result = dict.fromkeys(RESULTS.names)
    record |= {"id": row.id, "line": row.line, "model": row.model, "policy": row.policy, "endpoint": row.endpoint}
    if row.decision is not None:
        decision = row.decision
        record |= {"confidence": decision.confidence, "label": decision.label, "reason": decision.reason or None}
        record["truncated"] = decision.truncated
    if row.answers and row.decision is not None:
        record["answers"] = answers_body(done)
    if isinstance(outcome, Answer):
        answered = {"expert": outcome.expert, "answer": outcome.text, "notes": list(outcome.notes), "status": 200}
        return record | answered | result_columns(outcome) | outcome_columns(outcome)
    return record | _failed(describe(outcome, logged_as) if outcome is not None else row.error or {})


def merge(
    folder: Folder, parts: Sequence[str], *, lines: bool, on_rows: Callable[[int], None] = lambda done: None
) -> Counts:
    """Merge sorted parts into the final files.

    Args:
        parts: names of sorted runs (`write_run`).
        lines: also write results.jsonl.
        on_rows: called with the number of rows that were just written.
    """
    runs, rounds = list(parts), 0
    while len(runs) > FAN_IN:
        merged = [f"parts/merged/{rounds}/{i:06d}.arrows" for i in range(0, len(runs), FAN_IN)]
        for i, name in enumerate(merged):
            some = runs[i * FAN_IN : (i + 1) * FAN_IN]
            with ExitStack() as stack:
                write_run(folder, name, _merged(stack, folder, some))
        runs, rounds = merged, rounds + 1
    counts = Counts()
    with ExitStack() as stack:
        out = stack.enter_context(folder.write(LINES_FILE)) if lines else None
        records = _counted(_unique(_merged(stack, folder, runs)), counts, out)
        _write_final(folder, records, on_rows)
    return counts


def write_run(folder: Folder, name: str, records: Iterable[Result], note: bytes = b"") -> None:
    """Write records that are sorted by id and line, with a note.

    An Arrow stream, unlike Parquet, has no footer: reading it takes the memory of one batch, whatever its length.
    """
    left = iter(records)
    schema = RESULTS.with_metadata({_NOTE: note})
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with folder.write(name) as file, pa.ipc.new_stream(file, schema, options=options) as stream:
        while some := list(islice(left, RUN_ROWS)):
            stream.write_table(pa.Table.from_pylist(some, schema=schema))


def read_note(folder: Folder, name: str) -> bytes:
    """The note of a run."""
    with folder.open(name) as file:
        note: bytes = pa.ipc.open_stream(file).schema.metadata[_NOTE]
    return note


def _merged(stack: ExitStack, folder: Folder, names: Sequence[str]) -> Iterator[Result]:
    """The records of sorted runs, sorted."""
    files = [stack.enter_context(folder.open(name)) for name in names]
    return heapq.merge(*map(_records, files), key=lambda record: (record["id"], record["line"]))


def _records(file: IO[bytes]) -> Iterator[Result]:
    for batch in pa.ipc.open_stream(file):
        yield from batch.to_pylist()


def _unique(records: Iterable[Result]) -> Iterator[Result]:
    """The first row with an id keeps it; later ones become errors that name its line."""
    first: Result | None = None
    for record in records:
        if first is None or record["id"] != first["id"]:
            first = record
            yield record
            continue
        error = duplicate_id(record["id"], record["line"], first["line"])
        kept = {name: record[name] for name in ("id", "line", "model", "endpoint")}
        yield dict.fromkeys(RESULTS.names) | kept | _failed(error)


def _counted(records: Iterable[Result], counts: Counts, lines: IO[bytes] | None) -> Iterator[Result]:
    """The same records, after counting them and writing their lines."""
    for record in records:
        counts.add(record)
        if lines is not None:
            lines.write(json.dumps(batch_line(record), ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        yield record


def _write_final(folder: Folder, records: Iterator[Result], on_rows: Callable[[int], None]) -> None:
    with folder.write(RESULTS_FILE) as file, pq.ParquetWriter(file, FINAL) as writer:
        while some := list(islice(records, _FINAL_ROWS)):
            writer.write_table(pa.Table.from_pylist(some, schema=FINAL))
            on_rows(len(some))


def _failed(error: Mapping[str, Any]) -> Result:
    return {"status": error.get("status"), "error": {name: error.get(name) for name in _ERROR.names}}
