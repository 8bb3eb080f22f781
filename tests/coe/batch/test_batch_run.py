"""A run in this process: the right answer for each row, stage by stage, and the same files after any interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batch_runs import MIXED, InProcess, Quiet, Stop, openai_row, records, results, run, service, write_lines

from coe.batch.answering import WorkReport
from coe.batch.errors import BatchError
from coe.batch.parts import Job
from coe.batch.stages import WorkItem
from coe.compose import COMPOSITIONS, ExpertCall, ExpertCalls, Final
from coe.compose.base import Done
from coe.config import load_config
from coe.errors import ConfigError, UnknownModel
from coe.types import Answer, GenerateRequest, Usage
from registry.errors import InvalidSpec
from routers.artifacts import save
from routers.base import RoutingDecision
from routers.encoders.build import build_encoder
from routers.factory import build
from routers.outcomes.table import OutcomeTable


@pytest.fixture
def place(tmp_path: Path) -> Path:
    service(tmp_path)
    write_lines(tmp_path / "in.jsonl", MIXED)
    return tmp_path


def go(place: Path, output: str = "out", executor: InProcess | None = None, **options: Any) -> dict[str, Any]:
    return run(place / "service.yaml", place / "in.jsonl", place / output, executor, **options)


def test_every_row_gets_its_own_answer_or_its_own_error(place: Path) -> None:
    found = go(place)
    rows = records(place / "out")
    assert list(rows) == sorted(rows) and len(rows) == 302
    expected = {0: "HELLO 0", 1: "hello 1", 2: "[tuned] HELLO 2", 3: "hello 3"}
    assert {i: rows[f"row-{i:04d}"]["answer"] for i in expected} == expected
    assert [rows[f"row-{i:04d}"]["expert"] for i in range(6)] == ["loud", "base", "tuned", "base", None, None]
    assert [rows[f"row-{i:04d}"]["policy"] for i in range(4)] == ["default", None, None, "shaky"]
    assert rows["row-0004"]["error"]["code"] == "invalid_weights"
    assert rows["row-0005"]["error"]["code"] == "model_not_found"
    assert "'nobdy' is not in the registry" in rows["row-0005"]["error"]["message"]
    assert "line 301: is not JSON" in rows["line-0000000301"]["error"]["message"]
    assert rows["line-0000000303"]["answer"] == "a plain row"
    assert rows["row-0001"]["cost_usd"] == pytest.approx((2 * 1 + 2 * 2) / 1e6)
    assert rows["row-0001"]["line"] == 2 and rows["row-0001"]["reason"] == "named by the request"
    assert found["results"]["experts"] == {"loud": 50, "base": 101, "tuned": 50}
    assert found["results"]["errors"] == {"invalid_weights": 50, "model_not_found": 50, "invalid_request": 1}


def test_the_folder_has_results_and_run_json_only(place: Path) -> None:
    found = go(place)
    out = place / "out"
    kept = {path.name for path in out.iterdir()}
    assert kept == {"results.parquet", "results.jsonl", "run.json", ".lock"}
    assert json.loads((out / "run.json").read_text()) == found
    assert found["status"] == "complete" and found["input"]["rows"] == 303 and found["registry_version"] == 1
    [session] = found["sessions"]
    assert session["loads"] == {"base": 2, "loud": 1}  # the base again for the second stage
    assert session["answers"] == {"base": 101, "broken": 100, "loud": 50, "tuned": 50}
    assert session["failures"]["broken"] == 100 and session["status"] == "complete"
    assert len((out / "results.jsonl").read_text().splitlines()) == 302


def test_calls_are_grouped_by_residency(place: Path) -> None:
    executor = InProcess()
    go(place, executor=executor)
    first, second = executor.items
    assert sorted(first) == [("base", "tuned"), ("broken",), ("loud",)] and second == [("base",)]


def test_progress_is_by_expert_and_stage_and_adds_up(place: Path) -> None:
    watch = Quiet()
    go(place, watch=watch)
    phases = dict(watch.phases)
    assert phases["answering, stage 1"] == {"base": 51, "broken": 100, "loud": 50, "tuned": 50}
    assert phases["answering, stage 2"] == {"base": 50}
    for name, totals in phases.items():
        for each, total in totals.items():
            assert watch.done[name, each] == total


def test_parquet_in_gives_what_jsonl_gives(place: Path) -> None:
    rows = [row for row in MIXED if isinstance(row, dict) and "custom_id" in row]
    write_lines(place / "in.jsonl", rows)
    go(place)
    pq.write_table(pa.Table.from_pylist(rows), place / "in.parquet", row_group_size=70)
    run(place / "service.yaml", place / "in.parquet", place / "parquet")
    assert results(place / "parquet") == results(place / "out")


def test_plain_rows_have_no_lines_of_openai(place: Path) -> None:
    write_lines(place / "in.jsonl", [{"prompt": "a"}, {"prompt": "b", "user": "me"}])
    found = go(place, model="base")
    assert not (place / "out" / "results.jsonl").exists() and found["ignored_fields"] == {"user": 1}
    assert [row["answer"] for row in records(place / "out").values()] == ["a", "b"]
    assert {row["model"] for row in records(place / "out").values()} == {"base"}


def test_rows_with_one_id_are_distinguished_by_their_lines(place: Path) -> None:
    write_lines(place / "in.jsonl", [openai_row("same", "first"), openai_row("other", "x"), openai_row("same", "2nd")])
    found = go(place)
    rows = pq.read_table(place / "out" / "results.parquet").to_pylist()
    assert [(row["id"], row["line"], row["answer"]) for row in rows] == [
        ("other", 2, "X"),
        ("same", 1, "FIRST"),
        ("same", 3, None),
    ]
    assert (
        "is that of line 1 already" in rows[2]["error"]["message"] and found["results"]["errors"]["duplicate_id"] == 1
    )


def test_a_file_with_errors_only_makes_no_calls(place: Path) -> None:
    write_lines(place / "in.jsonl", ["nonsense", "[]"])
    executor = InProcess()
    assert go(place, executor=executor)["results"]["errors"] == {"invalid_request": 2}
    assert executor.items == [] and len(records(place / "out")) == 2


def test_wrong_configurations_and_models_are_refused_before_anything_is_written(place: Path) -> None:
    with pytest.raises(UnknownModel, match="did you mean 'shaky'"):
        go(place, model="coe/shakey")
    service(place, "{default: {expert: lod}}")
    with pytest.raises(ConfigError, match="did you mean 'loud'"):
        go(place)
    service(place, "{default: {expert: loud, fallback: lod}}")
    with pytest.raises(ConfigError, match="fallback of policy 'default'"):
        go(place)
    (place / "experts.yaml").write_text("experts: [{name: auto, kind: model, source: 'fake://echo'}]")
    with pytest.raises(InvalidSpec):
        go(place)
    assert not (place / "out").exists()


def test_without_policies_rows_name_their_experts(place: Path) -> None:
    service(place, "{}")
    write_lines(place / "in.jsonl", [{"id": "a", "prompt": "x", "model": "loud"}, {"id": "b", "prompt": "x"}])
    go(place)
    rows = records(place / "out")
    assert rows["a"]["answer"] == "X" and rows["b"]["error"]["code"] == "model_not_found"


def test_a_trained_router_sends_each_row_to_the_expert_that_was_measured_best(place: Path) -> None:
    encoder = build_encoder("hashing:256")
    calls = [f"capital of {name}?" for name in "Peru Chad Cuba Iran Mali Oman Fiji Laos Togo Malta".split()]
    shouts = [f"please shout {word}" for word in "dog cat sun moon tree sea rain wind bread milk".split()]
    table = OutcomeTable(
        query_ids=tuple(map(str, range(20))),
        prompts=(*calls, *shouts),
        experts=("base", "loud"),
        scores=np.repeat([[1.0, 0.0], [0.0, 1.0]], 10, axis=0),
        domains=("capitals",) * 10 + ("shouting",) * 10,
    )
    router = build("category", encoder, {"max_abstain": 0.0}).fit(table)
    save(router, place / "router", table=table, encoder=encoder)
    service(place, "{default: {router: router}}")
    write_lines(
        place / "in.jsonl", [{"id": "a", "prompt": "capital of Peru?"}, {"id": "b", "prompt": "please shout hi"}]
    )
    found = go(place)
    rows = records(place / "out")
    assert [(row["expert"], row["label"]) for row in rows.values()] == [("base", "capitals"), ("loud", "shouting")]
    assert 0.5 < rows["a"]["confidence"] <= 1 and found["manifest"]["policies"]["default"]["router"].startswith(
        "sha256:"
    )


class Debate:
    """Two experts answer; a third one joins their answers."""

    def step(self, request: GenerateRequest, decision: RoutingDecision, done: Done) -> ExpertCalls | Final:
        if not done:
            return ExpertCalls((ExpertCall("first", "base", request), ExpertCall("second", "loud", request)))
        if "join" not in done:
            said = "|".join(a.text for name in ("first", "second") if isinstance(a := done[name], Answer))
            return ExpertCalls((ExpertCall("join", "tuned", GenerateRequest(prompt=said)),), last=True)
        joined = done["join"]
        assert isinstance(joined, Answer)
        return Final(Answer("debate", joined.text, "stop", Usage(1, 1)))


def test_a_composition_of_two_stages_is_answered_stage_by_stage(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPOSITIONS, "debate", Debate)
    service(place, "{default: {expert: base, composition: debate}}")
    write_lines(place / "in.jsonl", [{"id": f"{i:03d}", "prompt": f"q {i}"} for i in range(150)])
    executor = InProcess()
    found = go(place, executor=executor)
    assert executor.items == [[("base",), ("loud",)], [("tuned",)]]
    rows = records(place / "out")
    assert rows["007"]["answer"] == "[tuned] Q 7|Q 7" and rows["007"]["expert"] == "debate"
    assert found["sessions"][0]["loads"] == {"base": 2, "loud": 1}


def test_several_hosts_give_the_same_files(place: Path) -> None:
    go(place)
    executor = InProcess(hosts=3)
    go(place, "more", executor)
    assert len(executor.items[0]) > 3 and results(place / "more") == results(place / "out")


def stops(place: Path) -> int:
    """Reports of an uninterrupted run with one unit per report."""
    counting = InProcess(stop_after=10**6)
    go(place, "counted", counting)
    assert counting.left is not None
    return 10**6 - counting.left


def test_stopped_at_any_moment_and_resumed_the_files_are_the_same(place: Path) -> None:
    moments = stops(place)
    whole = results(place / "counted")
    assert moments > 20
    for moment in range(0, moments, 6):
        output = f"stopped-{moment}"
        with pytest.raises(Stop):
            go(place, output, InProcess(stop_after=moment))
        assert json.loads((place / output / "run.json").read_text())["status"] == "interrupted"
        assert not (place / output / "results.parquet").exists()
        found = go(place, output, resume=True)
        assert results(place / output) == whole
        assert [session["status"] for session in found["sessions"]] == ["interrupted", "complete"]


def test_stopped_again_and_again_it_still_arrives_and_answers_nothing_twice(place: Path) -> None:
    stops(place)
    sessions = 0
    while True:
        sessions += 1
        try:
            found = go(place, executor=InProcess(stop_after=17), resume=sessions > 1)
            break
        except Stop:
            assert sessions < 40
    assert results(place / "out") == results(place / "counted") and 2 < sessions == len(found["sessions"])
    answered = sum(sum(session["answers"].values()) for session in found["sessions"])
    assert answered <= 301  # calls sent together; the last answers before a stop are not reported


def test_a_resumed_run_counts_what_was_there(place: Path) -> None:
    with pytest.raises(Stop):
        go(place, executor=InProcess(stop_after=8))
    watch = Quiet()
    go(place, watch=watch, resume=True)
    assert watch.done["answering, stage 1", "base"] == dict(watch.phases)["answering, stage 1"]["base"]


def test_what_an_executor_left_undone_is_given_to_it_again_while_that_helps(place: Path) -> None:
    class Tired(InProcess):
        """Does one work item at a time, and after `most` of them nothing."""

        most = 10**6

        def answer(self, job: Job, stage: int, items: Sequence[WorkItem]) -> Iterator[WorkReport]:
            self.most -= 1
            return super().answer(job, stage, items[:1] if self.most >= 0 else [])

    go(place)
    go(place, "tired", Tired())
    assert results(place / "tired") == results(place / "out")
    gone = Tired()
    gone.most = 1
    with pytest.raises(BatchError, match="files of answers are missing, .*--resume continues"):
        go(place, "gone", gone)
    go(place, "gone", resume=True)
    assert results(place / "gone") == results(place / "out")


def test_new_experts_do_not_join_a_run_that_began_without_them(place: Path) -> None:
    write_lines(place / "in.jsonl", [openai_row(f"{i:03d}", "x", "late" if i > 80 else "base") for i in range(200)])
    with pytest.raises(Stop):
        go(place, executor=InProcess(stop_after=1))
    experts = place / "experts.yaml"
    experts.write_text(experts.read_text() + '  - {name: late, kind: model, source: "fake://echo", size_bytes: 1}\n')
    go(place, resume=True)
    assert {row["expert"] for row in records(place / "out").values()} == {"base", None}


def test_the_configurations_part_size_bounds_the_parts(place: Path) -> None:
    service(place, more="batch: {part_rows: 64}\n")
    config = load_config(place / "service.yaml")
    assert go(place)["manifest"]["input"]["parts"] == 5 and config.batch.part_rows == 64
