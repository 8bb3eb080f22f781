"""The part files of a run, and the work on one part: route it, step it. Runs in any process with access to the storage.

    rows/000/000012.parquet              a part of the input, routed
    alone/000/000012.parquet             with a budget: the same, before the rows are assigned jointly (`joint`)
    calls/0/000/000012.parquet           its calls of stage 0, one row group for each unit (see `stages.Unit`)
    answers/0/000/000012-003.parquet     the answers to its unit 3
    results/000/000012.arrows            its results, sorted by id; the part is finished

A part is deterministic: a process that writes it again, after a crash or in parallel, writes the same content.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from coe.batch.budget import Budget, check_policy
from coe.batch.candidates import candidates_of, note_of, write_candidates
from coe.batch.joint import assigned_rows
from coe.batch.records import ANSWERS, CALLS, ROWS, RoutedRow, describe, dump_request, load_outcome, load_request
from coe.batch.results import read_note, result, write_run
from coe.batch.rows import InputRow, parse_row
from coe.batch.source import RawRow, Source, Split, read
from coe.batch.stages import Step, Unit, compositions, plan_units, step
from coe.compose import Composition, ExpertCall, WithFallback, build_composition, ruled_out
from coe.config import Config
from coe.errors import CoeError, EngineError
from coe.local import build_policies
from coe.orchestrator import Orchestrator
from coe.policy import AUTO, address
from coe.routing import Routed
from coe.runs.storage import Folder
from coe.signals.features import Signals
from coe.types import Answer, Chunk, Failure, GenerateRequest
from registry.spec import RESERVED_PREFIX
from registry.store import Snapshot
from routers.errors import NoEligibleExpert, RouterError

PARTS = "parts"
_NOTE = b"coe"


@dataclass(frozen=True, slots=True)
class Job:
    """What every process of a run needs.

    model: the model of rows that name none. budget: within which the rows are assigned; None routes each on its own.
    visible: the experts that may answer, and that errors may name; None: all.
    logged_as: id under which internal errors are logged, for results that clients read (`records.describe`).
    """

    folder: Folder
    source: Source
    config: Config
    snapshot: Snapshot
    model: str
    budget: Budget | None = None
    visible: frozenset[str] | None = None
    logged_as: str | None = None

    def composition_of(self) -> Callable[[RoutedRow], Composition]:
        """A function from a row to its composition; see `stages.compositions`."""
        chosen = {name: policy.composition for name, policy in self.config.policies.items()}
        kinds = {name: partial(build_composition, it.kind, it.settings) for name, it in chosen.items()}
        return compositions(kinds, self.snapshot.experts)

    def residency_of(self, expert: str) -> str:
        """What must be resident to call an expert; see `ExpertSpec.residency`."""
        return self.snapshot.residency(expert)


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """A part after a stage was planned. `units` is empty when the part is finished.

    openai: rows that are OpenAI batch lines. ignored: how many rows have each field that has no effect.
    """

    part: int
    rows: int
    openai: int
    ignored: Mapping[str, int] = field(default_factory=dict)
    units: tuple[Unit, ...] = ()


PLANNED_PART = TypeAdapter(PlannedPart)
"""Reads and writes a planned part as JSON."""


def open_router(config: Config, snapshot: Snapshot) -> Orchestrator:
    """The configured policies for routing: the same code as online, without experts to call.

    Raises:
        ConfigError, RouterError: a policy or its router is wrong.
    """
    policies = build_policies(config.policies, snapshot, Signals(snapshot, config.engines))
    return Orchestrator(snapshot, policies, ask=_no_expert, default_policy=config.default_policy)


def known(folder: Folder, part: int, stage: int) -> PlannedPart | None:
    """The part as an earlier session planned it for this stage, if it did."""
    if folder.exists(results_name(part)):
        return PLANNED_PART.validate_json(read_note(folder, results_name(part)))
    return planned_stage(folder, part, stage)


def planned_stage(folder: Folder, part: int, stage: int) -> PlannedPart | None:
    """The part as its calls of this stage were planned, if there are any."""
    if not folder.exists(_calls(stage, part)):
        return None
    with folder.open(_calls(stage, part)) as file:
        return PLANNED_PART.validate_json(pq.read_schema(file).metadata[_NOTE])


class PartRouter:
    """Routes parts of the input by the configured policies; holds their routers."""

    def __init__(self, job: Job, orchestrator: Orchestrator) -> None:
        self._job, self._orchestrator = job, orchestrator

    def route(self, splits: Sequence[Split]) -> Iterator[PlannedPart]:
        """Write the rows and the first calls of each split; what an earlier session wrote is kept.

        With a budget, write the rows and their candidates; the first calls follow when all rows are assigned.
        """
        folder = self._job.folder
        left = []
        for split in splits:
            before = known(folder, split.part, stage=0)
            if before is None and self._job.budget is not None:
                before = unassigned(folder, split.part)
            if before is not None:
                yield before
            else:
                left.append(split)
        for split, lines in read(self._job.source, left) if left else ():
            rows = [self._parse(line) for line in lines]
            outcomes = self._route(rows)
            routed = [_routed(row, outcome, self._job.logged_as) for row, outcome in zip(rows, outcomes, strict=True)]
            about = PlannedPart(
                split.part,
                rows=len(rows),
                openai=sum(row.endpoint is not None for row in rows),
                ignored=dict(Counter(name for row in rows for name in row.ignored)),
            )
            if self._job.budget is not None:
                _write(folder, _alone(split.part), ROWS, [row.record() for row in routed])
                candidates = candidates_of(outcomes, routed, self._job.snapshot, self._job.budget)
                write_candidates(folder, split.part, candidates, routed, PLANNED_PART.dump_json(about))
                yield about
                continue
            _write(folder, _rows(split.part), ROWS, [row.record() for row in routed])
            yield _plan(self._job, about, 0, routed, [{} for _ in routed])

    def _parse(self, line: RawRow) -> InputRow:
        visible = self._job.visible
        known = self._job.snapshot.experts if visible is None else visible
        return parse_row(line, self._job.model, known, others=visible is not None)

    def _route(self, rows: Sequence[InputRow]) -> list[Routed | RouterError | CoeError]:
        """Rows of the same `model` are routed in one call."""
        outcomes: dict[int, Routed | RouterError | CoeError] = {}
        by_model: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            if row.error is not None:
                outcomes[i] = row.error
            else:
                by_model.setdefault(row.model, []).append(i)
        for model, members in by_model.items():
            queries = [query for i in members if (query := rows[i].query) is not None]
            self._check(model)
            try:
                self._check_visible(model)
                found = list(map(self._discreet, self._orchestrator.route_each(queries, model)))
            except CoeError as error:
                found = [error] * len(members)
            outcomes.update(zip(members, found, strict=True))
        return [outcomes[i] for i in range(len(rows))]

    def _check_visible(self, model: str) -> None:
        """Raise UnknownModel where `model` names an expert that may not answer."""
        visible, router = self._job.visible, self._orchestrator
        if visible is not None:
            address(model, router.policies, router.default_policy, visible)

    def _discreet(self, outcome: Routed | RouterError | CoeError) -> Routed | RouterError | CoeError:
        """The outcome, or an error in its place that names no expert which may not answer."""
        visible = self._job.visible
        if visible is None or isinstance(outcome, Routed):
            return outcome
        text = str(outcome)
        if not any(name in text for name in self._job.snapshot.experts if name not in visible):
            return outcome
        constraints = outcome.constraints if isinstance(outcome, NoEligibleExpert) else frozenset()
        return NoEligibleExpert("no expert that the key may use can answer this request", constraints=constraints)

    def _check(self, model: str) -> None:
        """Raise BudgetError where the rows of a policy cannot be assigned."""
        policies = self._orchestrator.policies
        name = self._orchestrator.default_policy if model == AUTO else model.removeprefix(RESERVED_PREFIX)
        if self._job.budget is not None and name in policies and model != name:
            check_policy(policies[name], policies.values())


def unassigned(folder: Folder, part: int) -> PlannedPart | None:
    """The part as it was routed, before its rows were assigned jointly; None if it was not."""
    note = note_of(folder, part)
    return None if note is None else PLANNED_PART.validate_json(note)


def step_part(job: Job, part: int, stage: int) -> PlannedPart:
    """Plan the next stage of a part from all its answers so far, or write its results.

    Stage 0 is planned here for rows that were assigned jointly; others were planned when they were routed.
    """
    folder = job.folder
    if (before := known(folder, part, stage)) is not None:
        return before
    if stage == 0:
        about = unassigned(folder, part)
        assert about is not None and job.budget is not None  # the rows were routed, and are assigned
        alone = [RoutedRow.of(record) for record in _read(folder, _alone(part))]
        rows = assigned_rows(folder, part, alone, job.budget)
        _write(folder, _rows(part), ROWS, [row.record() for row in rows])
        return _plan(job, about, 0, rows, [{} for _ in rows])
    rows = [RoutedRow.of(record) for record in _read(folder, _rows(part))]
    done: list[dict[str, Answer | Failure]] = [{} for _ in rows]
    composition_of, about = job.composition_of(), None
    for earlier in range(stage):
        about = known(folder, part, earlier)
        assert about is not None  # a stage is planned only when those before it are answered
        outcomes = _outcomes(folder, earlier, about.units)
        for number, mine in outcomes.items():
            following = step(rows[number], composition_of(rows[number]), done[number])
            assert isinstance(following, tuple)  # steps are pure: the same calls as before
            done[number] |= {call.id: mine[call.id] for call in following}  # in the order of the calls, as online
    assert about is not None
    return _plan(job, about, stage, rows, done)


def _outcomes(folder: Folder, stage: int, units: Iterable[Unit]) -> dict[int, dict[str, Answer | Failure]]:
    """The answers of a stage by row, then by call."""
    outcomes: dict[int, dict[str, Answer | Failure]] = {}
    for unit in units:
        for record in _read(folder, answers_name(stage, unit)):
            outcomes.setdefault(record["row"], {})[record["call"]] = load_outcome(record)
    return outcomes


def routing_errors(folder: Folder, part: int) -> Counter[str]:
    """How many rows of a part fail before any call, by code. With a budget, once its rows are assigned."""
    with folder.open(_rows(part)) as file:
        errors = pq.read_table(file, columns=["error"]).column("error").to_pylist()
    return Counter(json.loads(error)["code"] for error in errors if error is not None)


def copy_routed(source: Folder, target: Folder, part: int) -> None:
    """Copy a routed part, and its first calls if it has any, to another folder."""
    for name in (_rows(part), _calls(0, part)):
        if source.exists(name):
            with source.open(name) as read, target.write(name) as written:
                shutil.copyfileobj(read, written)


def read_calls(folder: Folder, stage: int, unit: Unit) -> list[tuple[int, ExpertCall]]:
    """The calls of a unit, each with its row's position in the part."""
    with folder.open(_calls(stage, unit.part)) as file:
        records = pq.ParquetFile(file).read_row_group(unit.number).to_pylist()
    return [(r["row"], ExpertCall(r["call"], r["expert"], load_request(r["request"]), r["wants"])) for r in records]


def write_answers(folder: Folder, stage: int, unit: Unit, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the answers of a unit, in the order of its calls; then it is done."""
    _write(folder, answers_name(stage, unit), ANSWERS, records)


def answers_name(stage: int, unit: Unit) -> str:
    """The file with the answers of a unit."""
    return f"{answers_folder(stage)}/{_shelf(unit.part)}/{units_name(unit)}"


def units_name(unit: Unit) -> str:
    """The name of that file within its folder."""
    return f"{unit.part:06d}-{unit.number:03d}.parquet"


def answers_folder(stage: int) -> str:
    """The folder with all answers of a stage."""
    return f"{PARTS}/answers/{stage}"


def _no_expert(expert: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
    raise EngineError(f"{expert!r} was called by a process that only routes")


def _plan(
    job: Job, about: PlannedPart, stage: int, rows: Sequence[RoutedRow], done: Sequence[Mapping[str, Answer | Failure]]
) -> PlannedPart:
    """Step every row; write the calls that follow, or, where none do, the results."""
    composition_of = job.composition_of()
    steps: list[Step | None] = [
        None if row.error is not None else step(row, composition_of(row), outcomes)
        for row, outcomes in zip(rows, done, strict=True)
    ]
    calls = [(i, call) for i, following in enumerate(steps) if isinstance(following, tuple) for call in following]
    planned = plan_units(about.part, calls, job.residency_of)
    about = PlannedPart(about.part, about.rows, about.openai, about.ignored, tuple(unit for unit, _ in planned))
    if calls:
        groups = ([_call_record(row, call) for row, call in members] for _, members in planned)
        _write(job.folder, _calls(stage, about.part), CALLS, *groups, note=PLANNED_PART.dump_json(about))
    else:
        outcomes = (None if isinstance(following, tuple) else following for following in steps)
        finished = zip(rows, outcomes, done, strict=True)
        records = [result(row, outcome, calls, job.logged_as) for row, outcome, calls in finished]
        records.sort(key=lambda record: (record["id"], record["line"]))
        write_run(job.folder, results_name(about.part), records, PLANNED_PART.dump_json(about))
    return about


def _routed(row: InputRow, outcome: Routed | RouterError | CoeError, logged_as: str | None) -> RoutedRow:
    if not isinstance(outcome, Routed):
        return RoutedRow(row.line, row.id, row.model, row.endpoint, error=describe(outcome, logged_as))
    return RoutedRow(
        line=row.line,
        id=row.id,
        model=row.model,
        endpoint=row.endpoint,
        request=row.request,
        policy=outcome.policy.name if outcome.policy else None,
        fallback=outcome.composition.expert if isinstance(outcome.composition, WithFallback) else None,
        barred=ruled_out(outcome.composition) or None,
        answers=row.answers,
        decision=outcome.decision,
    )


def _call_record(row: int, call: ExpertCall) -> dict[str, Any]:
    request = dump_request(call.request)
    return {"row": row, "call": call.id, "expert": call.expert, "request": request, "wants": call.wants}


def _write(
    folder: Folder,
    name: str,
    schema: pa.Schema,
    *row_groups: Sequence[Mapping[str, Any]],
    note: bytes | None = None,
) -> None:
    schema = schema.with_metadata({_NOTE: note}) if note is not None else schema
    with folder.write(name) as file, pq.ParquetWriter(file, schema) as writer:
        for records in row_groups:
            writer.write_table(pa.Table.from_pylist(list(records), schema=schema))


def _read(folder: Folder, name: str) -> Iterable[dict[str, Any]]:
    with folder.open(name) as file:
        records: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return records


def _rows(part: int) -> str:
    return f"{PARTS}/rows/{_shelf(part)}/{part:06d}.parquet"


def _alone(part: int) -> str:
    return f"{PARTS}/alone/{_shelf(part)}/{part:06d}.parquet"


def _calls(stage: int, part: int) -> str:
    return f"{PARTS}/calls/{stage}/{_shelf(part)}/{part:06d}.parquet"


def results_name(part: int) -> str:
    """The file with the results of a part."""
    return f"{PARTS}/results/{_shelf(part)}/{part:06d}.arrows"


def _shelf(part: int) -> str:
    """A thousand parts to a folder, so that listing one stays fast."""
    return f"{part // 1000:03d}"
