"""Runs: what is measured, one load per base, no repeated calls for answered questions."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coe.engines.fake import FakeEngine
from coe.errors import ContextLengthExceeded, EngineError, InvalidRequest, RemoteError, WeightsError
from coe.evaluation.answer_folder import open_answer_folder
from coe.evaluation.answer_log import AnswerLog, AnswerRecord, read_log
from coe.evaluation.graders.number import Number
from coe.evaluation.graders.text import Exact
from coe.evaluation.plan import EvaluationPlan, Settings, plan_run
from coe.evaluation.report import Report
from coe.evaluation.runner import Progress, run
from coe.evaluation.tasks import Task, TaskRow
from coe.host import Host
from coe.orchestrator import AskExpert
from coe.runs.errors import RunFolderError
from coe.types import Chunk, GenerateRequest, Usage
from registry.errors import DiskFull, UnknownExpert
from registry.spec import ExpertSpec, Kind, Price
from registry.store import Snapshot
from routers.base import Message
from routers.outcomes.table import OutcomeTable

MIB = 2**20


def expert(name: str, source: str, **fields: Any) -> ExpertSpec:
    kind = Kind.ADAPTER if "base" in fields else Kind.MODEL
    price = Price(input_usd_per_mtok=1.0, output_usd_per_mtok=2.0)
    return ExpertSpec(
        **{
            "kind": kind,
            "price": price,
            "digest": f"sha256:{name}",
            "size_bytes": 4 * MIB,
            **fields,
            "name": name,
            "source": source,
        }
    )


EXPERTS = {
    spec.name: spec
    for spec in (
        expert("echo", "fake://echo"),
        expert("caps", "fake://script?france=Paris&italy=Rome"),
        expert("echo-lora", "fake://script?default=8", base="echo"),
        expert("caps-lora", "fake://script?2=4&default=Paris", base="caps"),
    )
}


def task(name: str, pairs: list[tuple[str, str, Any]], grader: Any, **fields: Any) -> Task:
    rows = tuple(
        TaskRow(id_, (Message("user", prompt),), {"id": id_, "prompt": prompt, "answer": gold})
        for id_, prompt, gold in pairs
    )
    return Task(name, fields.pop("domain", name), rows, grader, digest=f"sha256:{name}", **fields)


TASKS = (
    task("capitals", [("fr", "France?", "Paris"), ("it", "Italy?", "Rome")], Exact(), domain="geography"),
    task("sums", [("a", "2 + 2", 4), ("b", "3 + 5", 8), ("c", "1 + 7", 8)], Number()),
)
PLAN = plan_run(EXPERTS, TASKS)


def host(engine: FakeEngine | None = None, specs: dict[str, ExpertSpec] = EXPERTS) -> Host:
    snapshot = Snapshot(version=1, experts=specs)
    return Host(snapshot, {"fake": engine or FakeEngine()}, budget_bytes=6 * MIB, locate=lambda spec: Path("/nowhere"))


async def evaluate(
    folder: Path,
    ask: AskExpert | None = None,
    plan: EvaluationPlan = PLAN,
    *,
    resume: bool = True,
    discard: bool = False,
    **options: Any,
) -> Report:
    with open_answer_folder(folder, plan, resume=resume, discard=discard) as opened:
        return await run(plan, opened, ask or host().ask, **options)


def counting(asked: list[tuple[str, str]], ask: AskExpert | None = None) -> AskExpert:
    inner = ask or host().ask

    async def recorded(name: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        asked.append((name, request.id))
        async for chunk in inner(name, request):
            yield chunk

    return recorded


def failing(error: Callable[[str], Exception | None]) -> AskExpert:
    """An expert that raises what `error(request id)` gives, if anything, and else answers 4."""

    async def ask(name: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        if (raised := error(request.id)) is not None:
            raise raised
        yield Chunk("4", "stop", Usage(3, 1))

    return ask


async def test_a_run_measures_every_expert_on_every_row(tmp_path: Path) -> None:
    report = await evaluate(tmp_path)
    table = OutcomeTable.read(tmp_path / "outcomes.parquet")
    assert table.query_ids == ("capitals/fr", "capitals/it", "sums/a", "sums/b", "sums/c")
    assert table.prompts == ("France?", "Italy?", "2 + 2", "3 + 5", "1 + 7")
    assert table.domains == ("geography", "geography", "sums", "sums", "sums")
    assert table.experts == tuple(EXPERTS)
    assert table.scores.T.tolist() == [[0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]
    assert table.answers is not None and table.answers["caps"] == ("Paris", "Rome", "2 + 2", "3 + 5", "1 + 7")
    assert table.frame is not None and list(table.frame["dataset"]) == ["capitals"] * 2 + ["sums"] * 3
    assert list(table.frame["answer"]) == ["Paris", "Rome", "4", "8", "8"]
    assert table.tokens is not None and table.tokens[:, 0].tolist() == [1, 1, 3, 3, 3]
    assert table.costs_usd is not None and table.costs_usd[2, 0] == pytest.approx((3 * 1 + 3 * 2) / 1e6)
    assert report.cells["caps", "capitals"].mean_score == 1 and report.cells["caps", "capitals"].n == 2
    summary = json.loads((tmp_path / "run.json").read_text())
    assert summary["status"] == "complete" and summary["experts"]["caps"]["mean_score"] == 0.4
    assert summary["experts"]["echo-lora"]["digest"] == "sha256:echo-lora"
    assert summary["tasks"]["sums"]["digest"] == "sha256:sums"
    assert summary["sessions"][0]["answers"] == 20 and summary["sessions"][0]["completion_tokens"] == table.tokens.sum()


async def test_each_base_is_loaded_once_whatever_the_order_of_experts(tmp_path: Path) -> None:
    engine = FakeEngine()
    names = ["echo-lora", "caps", "echo", "caps-lora"]
    served = host(engine)
    await evaluate(
        tmp_path, served.ask, plan_run(EXPERTS, TASKS, names), loads=lambda: served.cache.stats.loads_by_name
    )
    assert engine.tally.loads == {"echo": 1, "caps": 1}
    assert engine.tally.generations == dict.fromkeys(names, 5)
    assert json.loads((tmp_path / "run.json").read_text())["sessions"][0]["loads"] == {"echo": 1, "caps": 1}


async def test_concurrency_bounds_the_questions_in_flight(tmp_path: Path) -> None:
    now, most = 0, 0

    async def ask(name: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0.001)
        now -= 1
        yield Chunk("4", "stop", Usage(1, 1))

    await evaluate(tmp_path, ask, concurrency=3)
    assert most == 3


@pytest.mark.parametrize("seed", range(8))
async def test_a_killed_run_goes_on_to_the_same_bytes(seed: int, tmp_path: Path) -> None:
    await evaluate(tmp_path / "whole")
    whole = (tmp_path / "whole" / "outcomes.parquet").read_bytes()
    lines = (tmp_path / "whole" / "answers.jsonl").read_bytes()
    folder = tmp_path / "killed"
    folder.mkdir()
    running = json.loads((tmp_path / "whole" / "run.json").read_text()) | {"status": "running", "sessions": []}
    (folder / "run.json").write_text(json.dumps(running))
    kept = lines[: random.Random(seed).randrange(len(lines))]
    (folder / "answers.jsonl").write_bytes(kept)
    asked: list[tuple[str, str]] = []
    with open_answer_folder(folder, PLAN, resume=True) as opened:
        assert opened.was_cut == (not kept.endswith(b"\n") and bool(kept))
        await run(PLAN, opened, counting(asked))
    assert (folder / "outcomes.parquet").read_bytes() == whole
    assert len(asked) == 20 - kept.count(b"\n")
    assert len((folder / "answers.jsonl").read_bytes().splitlines()) == 20


async def test_a_complete_run_asks_nothing_and_a_discarded_one_everything(tmp_path: Path) -> None:
    await evaluate(tmp_path)
    asked: list[tuple[str, str]] = []
    told: list[Progress] = []
    report = await evaluate(tmp_path, counting(asked), on_progress=told.append)
    assert asked == [] and len(report.summary["sessions"]) == 1
    assert [(p.expert, p.done, p.total) for p in told] == [(name, 5, 5) for name in EXPERTS]
    await evaluate(tmp_path, counting(asked), discard=True)
    assert len(asked) == 20


async def test_cancelled_runs_keep_their_answers(tmp_path: Path) -> None:
    answered = asyncio.Event()

    def on_progress(progress: Progress) -> None:
        if progress.expert == "caps" and progress.done == 2:
            answered.set()

    running = asyncio.create_task(evaluate(tmp_path, concurrency=1, on_progress=on_progress))
    await answered.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    summary = json.loads((tmp_path / "run.json").read_text())
    kept = summary["sessions"][0]["answers"]
    assert summary["status"] == "interrupted" and kept >= 12
    assert not (tmp_path / "outcomes.parquet").exists()
    asked: list[tuple[str, str]] = []
    report = await evaluate(tmp_path, counting(asked))
    assert len(asked) == 20 - kept and len(report.summary["sessions"]) == 2


async def test_stale_answers_are_never_reused(tmp_path: Path) -> None:
    await evaluate(tmp_path)
    changed = {**EXPERTS, "echo": EXPERTS["echo"].model_copy(update={"digest": "sha256:other"})}
    others = {
        r"experts: ~echo sha256:echo -> sha256:other, ~echo-lora": plan_run(changed, TASKS),
        r"experts: -echo-lora, -caps-lora": plan_run(EXPERTS, TASKS, ["echo", "caps"]),
        r"tasks: -sums": plan_run(EXPERTS, TASKS[:1]),
        r"tasks: ~sums": plan_run(EXPERTS, (TASKS[0], replace(TASKS[1], digest="sha256:new"))),
        r"settings: ~temperature 0.0 -> 0.5": plan_run(EXPERTS, TASKS, settings=Settings(temperature=0.5)),
        r"settings: ~limit None -> 1": plan_run(EXPERTS, TASKS, settings=Settings(limit=1)),
    }
    for difference, plan in others.items():
        with pytest.raises(RunFolderError, match=rf"holds another run \({difference}.*\).*--out"):
            await evaluate(tmp_path, plan=plan)
    with pytest.raises(RunFolderError, match=r"holds this run already \(complete\): add --resume .*another --out"):
        await evaluate(tmp_path, resume=False)
    answers = (tmp_path / "answers.jsonl").read_text().replace('"run": "', '"run": "0')
    (tmp_path / "answers.jsonl").write_text(answers)
    with pytest.raises(RunFolderError, match=r"answers.jsonl:1: an answer of another run"):
        await evaluate(tmp_path)


async def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        await evaluate(tmp_path / "file")
    for content in ("{", "[]", "{}"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(RunFolderError, match="was not written by `coe eval`"):
            await evaluate(tmp_path)
    (tmp_path / "run.json").unlink()
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(RunFolderError, match=r"no run.json, which would say"):
        await evaluate(tmp_path)
    await evaluate(tmp_path, discard=True)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join([*lines[:2], "{}\n", *lines[2:]]))
    with pytest.raises(RunFolderError, match=r"answers.jsonl:3: damaged"):
        await evaluate(tmp_path)


async def test_a_folder_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    with open_answer_folder(tmp_path, PLAN), pytest.raises(RunFolderError, match="in use"):
        await evaluate(tmp_path)


async def test_a_row_that_does_not_fit_scores_zero_for_good(tmp_path: Path) -> None:
    def error(id_: str) -> Exception | None:
        too_long = ContextLengthExceeded("echo", prompt_tokens=9, max_tokens=8, context_length=10)
        return too_long if id_.startswith("echo/") else None

    report = await evaluate(tmp_path, failing(error))
    assert report.cells["echo", "sums"].failures == 3 and report.cells["echo", "sums"].mean_score == 0
    assert report.summary["experts"]["echo"]["errors"][0].startswith("ContextLengthExceeded: the prompt has 9 tokens")
    asked: list[tuple[str, str]] = []
    await evaluate(tmp_path, counting(asked))
    assert asked == []


async def test_an_engine_s_failure_is_recorded_and_asked_again(tmp_path: Path) -> None:
    report = await evaluate(tmp_path, failing(lambda id_: RemoteError("down") if id_ == "caps/sums/a" else None))
    assert report.cells["caps", "sums"].failures == 1
    assert report.outcome_table().scores[2, 1] == 0
    asked: list[tuple[str, str]] = []
    again = await evaluate(tmp_path, counting(asked, failing(lambda _: None)))
    assert asked == [("caps", "caps/sums/a")]
    assert again.cells["caps", "sums"].failures == 0 and again.outcome_table().scores[2, 1] == 1


async def test_an_expert_that_always_fails_stops_the_run(tmp_path: Path) -> None:
    ask = failing(lambda id_: RemoteError("no key") if id_.startswith("caps/") else None)
    with pytest.raises(
        EngineError, match=r"'caps' failed on all of its 5 first rows; the last one: RemoteError: no key"
    ):
        await evaluate(tmp_path, ask)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "stopped"
    asked: list[tuple[str, str]] = []
    await evaluate(tmp_path, counting(asked))
    assert len([name for name, _ in asked if name == "caps"]) == 5
    assert not [name for name, _ in asked if name == "echo"]


async def test_weights_that_cannot_be_loaded_stop_the_run_with_their_cause(tmp_path: Path) -> None:
    broken = {**EXPERTS, "caps": expert("caps", "fake://fail?at=load")}
    with pytest.raises(EngineError, match="caps"):
        await evaluate(tmp_path, host(specs=broken).ask, plan_run(broken, TASKS))

    def error(_: str) -> Exception:
        failure = WeightsError("truncated")
        failure.__cause__ = ValueError("byte 7")
        return failure

    with pytest.raises(WeightsError, match="truncated") as caught:
        await evaluate(tmp_path / "other", failing(error))
    assert str(caught.value.__cause__) == "byte 7"


async def test_bugs_are_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        await evaluate(tmp_path, failing(lambda _: ZeroDivisionError()))


async def test_half_an_emoji_can_be_written(tmp_path: Path) -> None:
    async def ask(name: str, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        yield Chunk("\ud83d")
        yield Chunk("4", "stop", Usage(1, 1))

    report = await evaluate(tmp_path, ask)
    answers = OutcomeTable.read(tmp_path / "outcomes.parquet").answers
    assert answers is not None and set(answers["echo"]) == {"?4"}
    assert report.cells["echo", "sums"].n == 3


async def test_costs_are_left_out_where_a_price_is_unknown(tmp_path: Path) -> None:
    experts = {**EXPERTS, "echo": EXPERTS["echo"].model_copy(update={"price": None})}
    report = await evaluate(tmp_path, plan=plan_run(experts, TASKS))
    assert report.outcome_table().costs_usd is None


def test_sampled_requests_depend_on_the_run_and_the_row_only() -> None:
    def seeds(**settings: Any) -> list[int | None]:
        plan = plan_run(EXPERTS, TASKS, settings=Settings(**settings))
        return [
            question.request(plan.settings).seed
            for _, questions in plan.residencies()
            for question in questions
            if question.expert.name == "echo"
        ]

    assert seeds() == [None] * 5
    assert seeds(temperature=1.0) == seeds(temperature=1.0) != seeds(temperature=1.0, seed=1)
    assert len(set(seeds(temperature=1.0))) == 5


def test_a_limit_takes_the_first_rows_of_each_task() -> None:
    plan = plan_run(EXPERTS, TASKS, ["caps"], Settings(limit=2))
    assert plan.n_rows == 4
    assert [question.key for _, questions in plan.residencies() for question in questions] == [
        ("caps", "capitals", "fr"),
        ("caps", "capitals", "it"),
        ("caps", "sums", "a"),
        ("caps", "sums", "b"),
    ]


def test_only_experts_that_answer_are_evaluated() -> None:
    remote = ExpertSpec(name="far", kind=Kind.REMOTE, source="https://host/v1", model="m")
    embedder = ExpertSpec(name="embed", kind=Kind.EMBEDDING, source="/models/e")
    known = {**EXPERTS, "far": remote, "embed": embedder}
    plan = plan_run(known, TASKS)
    assert [spec.name for spec in plan.experts] == [*EXPERTS, "far"]
    moved = {**known, "far": remote.model_copy(update={"model": "n"})}
    assert plan.manifest()["experts"]["far"] != plan_run(moved, TASKS).manifest()["experts"]["far"]
    assert plan.manifest()["experts"]["echo-lora"] == "sha256:echo-lora on sha256:echo"
    with pytest.raises(InvalidRequest, match="'embed' is of kind 'embedding'"):
        plan_run(known, TASKS, ["embed"])
    with pytest.raises(UnknownExpert, match="did you mean 'caps'"):
        plan_run(known, TASKS, ["cap"])
    with pytest.raises(InvalidRequest, match="no expert"):
        plan_run({"embed": embedder}, TASKS)


@pytest.mark.parametrize(
    "settings", [{"limit": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}]
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Settings(**settings)


def record(row: str) -> AnswerRecord:
    return AnswerRecord("r", "e", "t", row, "answer", 1.0, 1, 1, 0.1)


def test_answers_are_written_in_batches(tmp_path: Path) -> None:
    now = 0.0
    path = tmp_path / "answers.jsonl"
    with AnswerLog(path, clock=lambda: now) as log:
        for n in range(15):
            log.append(record(str(n)))
        assert path.read_bytes() == b""
        log.append(record("15"))
        assert len(path.read_bytes().splitlines()) == 16
        now = 2.0
        log.append(record("16"))
        assert len(path.read_bytes().splitlines()) == 17
        log.append(record("17"))
    assert [r.row for r in read_log(path, "r")[0]] == [str(n) for n in range(18)]


def test_a_full_disk_leaves_whole_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "answers.jsonl"
    write = os.write

    def half(descriptor: int, data: bytes) -> int:
        if len(data) < 120:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    with AnswerLog(path) as log:
        log.append(record("a"))
    with pytest.raises(DiskFull), AnswerLog(path) as log:
        log.append(record("b"))
        monkeypatch.setattr(os, "write", half)
        log.flush()
    records, was_cut = read_log(path, "r")
    assert [r.row for r in records] == ["a"] and not was_cut
