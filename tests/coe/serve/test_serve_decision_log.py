"""The decision log: the content of a line, a caller that never waits, and the log after faults."""

import errno
import json
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_requests import answer, bypassed, finished, inputs, policy, routed

from coe.compose import Single
from coe.config import DecisionLogConfig
from coe.routing import Routed
from coe.serve.decisions import log as module
from coe.serve.decisions.entry import DecisionLogError, decode, encode, query_digest
from coe.serve.decisions.log import DecisionLog, RotatingFiles, read_log
from routers.base import Estimate, Message, Query, ToolCall
from routers.decision import Utility
from routers.selectors import Dynamic


def config(folder: Path, **settings: Any) -> DecisionLogConfig:
    return DecisionLogConfig(folder=folder, **settings)


def ids(*paths: Path) -> list[str]:
    return [entry.id for entry in read_log(paths, pytest.fail)]


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def test_a_line_says_everything_about_a_request() -> None:
    line = json.loads(encode(finished(), texts=False))
    assert line["format"] == "coe-decision/1" and line["id"] == "d-1" and line["model"] == "auto"
    assert line["time"] == "2023-11-14T22:13:20.250000+00:00"
    assert (line["policy"], line["router_digest"], line["registry_version"]) == ("default", "sha256:1", 3)
    assert line["query"] == {
        "digest": query_digest(Query.of("Which is it?")),
        "n_messages": 1,
        "n_characters": 12,
        "allowed": None,
        "cost_weight": None,
        "seed": None,
        "max_tokens": None,
        "raw": False,
        "needs": [],
    }
    assert line["inputs"]["quality"] == [0.5, 0.9, 0.1] and line["inputs"]["select"] == {"kind": "top-k", "k": 2}
    assert line["inputs"]["allowed"] == ["cheap", "general", "good"]
    assert line["decision"]["experts"] == ["good", "cheap"]
    assert (line["expert"], line["status"], line["error"], line["streamed"]) == ("good", 200, None, False)
    assert line["usage"] == {"prompt_tokens": 7, "completion_tokens": 3} and line["cost_usd"] == 0.25
    assert line["latency_s"] == {
        "route": 0.004,
        "first": 2.1,
        "total": 5.125,
        "gateway": 0.125,
        "queue": 0.5,
        "load": 1.5,
        "engine": 3.0,
    }


def test_a_refused_request_has_a_line_without_a_decision() -> None:
    refused = finished(routed=None, expert=None, answer=None, error="model_not_found", status=404, first_s=None)
    line = json.loads(encode(refused, texts=True))
    assert line["decision"] is line["inputs"] is line["query"] is line["usage"] is line["cost_usd"] is None
    assert line["error"] == "model_not_found" and line["latency_s"]["gateway"] is None
    entry = decode(encode(refused, texts=True), "here")
    assert entry.decision is None and entry.inputs is None and entry.query is None and entry.policy is None


def test_an_answer_without_timing_or_price_leaves_those_out() -> None:
    line = json.loads(encode(finished(answer=answer(cost_usd=None, timing=None)), texts=False))
    assert line["cost_usd"] is None and line["latency_s"]["engine"] is None


CALLED = (
    Message("user", "see", parts=({"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}})),
    Message("assistant", "", (ToolCall("c", "f", "{"),), reasoning="hm"),
    Message("tool", "4", tool_call_id="c", name="f"),
)


def test_texts_are_written_only_when_asked_for_and_come_back_as_the_query() -> None:
    query = Query(
        (Message("system", "be brief \udc80 é"), Message("user", "{}\n\"'"), *CALLED),
        needs=frozenset({"vision"}),
        tools=({"type": "function", "function": {"name": "f"}},),
        format="json",
        allowed=frozenset({"good", "cheap"}),
        cost_weight=0.1,
        seed=7,
    )
    request = finished(routed=Routed(query, routed().decision, policy(), inputs(), Single()))
    assert b"be brief" not in encode(request, texts=False)
    assert decode(encode(request, texts=False), "here").query is None
    assert decode(encode(request, texts=True), "here").query == query


def test_equal_queries_have_equal_digests_whatever_else_is_asked() -> None:
    one = query_digest(Query.of("a", tools=({"x": 1, "y": 2},)))
    assert one == query_digest(Query.of("a", tools=({"y": 2, "x": 1},), cost_weight=3.0, allowed=frozenset("b")))
    assert one != query_digest(Query.of("b", tools=({"x": 1, "y": 2},))) != query_digest(Query.of("b"))


def test_every_field_of_the_decision_inputs_survives_to_the_last_bit() -> None:
    estimate = Estimate(
        ("a", "b"),
        np.array([[0.1 + 0.2, np.nan]]),
        cost_usd=np.array([[5e-324, np.inf]], dtype=np.float64),
        ood=np.array([np.float32(0.1)]),
        labels=("maths",),
        eligible=np.array([[True, False]]),
        abstained=np.array([True]),
        confidence=np.array([-np.inf]),
        reasons=("because",),
        truncated=np.array([True]),
    )
    made_from = inputs(
        estimate=estimate,
        utility=Utility(0.0, 0.3),
        load_s={"a": 1 / 3},
        allowed=frozenset("ab"),
        select=Dynamic(p=0.1 + 0.2, k=3),
    )
    back = decode(encode(finished(routed=routed(made_from=made_from)), texts=False), "here").inputs
    assert back is not None and back.load_s == {"a": 1 / 3} and back.utility == Utility(0.0, 0.3)
    for name in ("quality", "cost_usd", "ood", "eligible", "abstained", "confidence", "truncated"):
        np.testing.assert_array_equal(getattr(back.estimate, name), getattr(estimate, name), strict=name != "ood")
    assert (back.estimate.labels, back.estimate.reasons) == (("maths",), ("because",))
    assert (back.allowed, back.select, back.seed) == (frozenset("ab"), Dynamic(p=0.1 + 0.2, k=3), None)


def test_lines_are_in_the_file_in_order_after_close(tmp_path: Path) -> None:
    log = DecisionLog(config(tmp_path / "new" / "folder"), process="7")
    for i in range(100):
        log.write(finished(id=f"d-{i}"))
    log.close()
    [file] = (tmp_path / "new" / "folder").iterdir()
    assert file.name.startswith("decisions-2") and file.name.endswith("Z-7-000001.jsonl")
    assert file.stat().st_mode & 0o077 == 0, "prompts are readable by the owner only"
    assert ids(file) == [f"d-{i}" for i in range(100)] and log.dropped == 0
    log.write(finished())
    assert log.dropped == 1


def test_nothing_written_leaves_no_file(tmp_path: Path) -> None:
    DecisionLog(config(tmp_path)).close()
    assert list(tmp_path.iterdir()) == []


def test_rotation_keeps_the_newest_files_of_this_process(tmp_path: Path) -> None:
    line = encode(finished(), texts=False)
    log = DecisionLog(config(tmp_path, max_bytes=3 * len(line) + 10, keep=2))
    for i in range(10):
        log.write(finished(id=f"d-{i}"))
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name[-8:] for file in files] == ["03.jsonl", "04.jsonl"]
    assert [ids(file) for file in files] == [["d-6", "d-7", "d-8"], ["d-9"]]
    assert ids(tmp_path) == ["d-6", "d-7", "d-8", "d-9"]


def test_a_line_longer_than_a_file_may_be_has_one_of_its_own(tmp_path: Path) -> None:
    files = RotatingFiles(tmp_path, "1", max_bytes=10, keep=5)
    for line in (b"a\n", b"long " * 10 + b"\n", b"b\n"):
        files.append(line)
    files.close()
    files.close()  # closing twice has no effect
    assert [file.read_bytes()[:1] for file in sorted(tmp_path.iterdir())] == [b"a", b"l", b"b"]


def test_running_processes_keep_their_files_and_ended_ones_share_a_bound(tmp_path: Path) -> None:
    ended = [RotatingFiles(tmp_path, f"ended{i}", max_bytes=1, keep=9) for i in range(2)]
    running = RotatingFiles(tmp_path, "running", max_bytes=1, keep=9)
    for files in (*ended, running):
        for _ in range(3):
            files.append(b"x\n")
    for files in ended:
        files.close()
    new = RotatingFiles(tmp_path, "new", max_bytes=1, keep=2)
    new.append(b"x\n")
    left = [file.name.split("Z-")[1].removesuffix(".jsonl") for file in sorted(tmp_path.iterdir())]
    assert left == [
        "ended1-000002",
        "ended1-000003",
        "running-000001",
        "running-000002",
        "running-000003",
        "new-000001",
    ]
    running.close()
    new.close()


def test_a_stuck_disk_neither_delays_the_caller_nor_grows_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stuck, go_on, write = threading.Event(), threading.Event(), os.write

    def slow(descriptor: int, data: Any) -> int:
        stuck.set()
        go_on.wait(10)
        return write(descriptor, data)

    monkeypatch.setattr(module.os, "write", slow)
    line = encode(finished(), texts=False)
    log = DecisionLog(config(tmp_path), pending_bytes=5 * len(line))
    log.write(finished())
    assert stuck.wait(10)
    started = time.perf_counter()
    for _ in range(20):
        log.write(finished())
    assert time.perf_counter() - started < 1.0
    assert log.dropped == 16  # five fit the queue, including the one being written
    go_on.set()
    log.close()
    assert len(ids(tmp_path)) == 5
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "does not keep up" in said[0] and "16 decisions dropped" in said[1]


def test_closing_does_not_wait_for_a_disk_that_is_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go_on, stuck, write = threading.Event(), threading.Event(), os.write

    def never(descriptor: int, data: Any) -> int:
        stuck.set()
        go_on.wait(10)
        return write(descriptor, data)

    monkeypatch.setattr(module.os, "write", never)
    log = DecisionLog(config(tmp_path))
    log.write(finished())
    assert stuck.wait(10)
    log.write(finished())
    log.close(timeout_s=0.05)
    assert log.dropped == 2 and "2 decisions lost" in caplog.text
    go_on.set()
    log._writer.join(10)


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_drops_counts_and_says_so_once_and_then_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, room = os.write, [40]

    def partly(descriptor: int, data: Any) -> int:
        """A disk with 40 bytes left."""
        taken = bytes(data)[: room[0]]
        room[0] -= len(taken)
        return write(descriptor, taken) if taken else full()

    log = DecisionLog(config(tmp_path))
    log.write(finished(id="before"))
    wait_until(lambda: any(file.read_bytes().endswith(b"\n") for file in tmp_path.iterdir()))
    monkeypatch.setattr(module.os, "write", partly)
    for _ in range(3):
        log.write(finished())
    wait_until(lambda: log.dropped == 3)
    monkeypatch.undo()
    log.write(finished(id="after"))
    log.close()
    assert ids(tmp_path) == ["before", "after"], "no half line is left between them"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "No space left" in said[0] and "3 decisions dropped" in said[1]


def test_half_a_line_that_cannot_be_removed_ends_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    files = RotatingFiles(tmp_path, "1", max_bytes=10**6, keep=5)
    line = encode(finished(), texts=False)
    files.append(line)

    def half_then_full(descriptor: int, data: Any) -> int:
        monkeypatch.setattr(module.os, "write", full)
        return write(descriptor, bytes(data)[:30])

    monkeypatch.setattr(module.os, "write", half_then_full)
    monkeypatch.setattr(module.os, "ftruncate", full)
    with pytest.raises(OSError, match="No space"):
        files.append(line)
    monkeypatch.undo()
    files.append(line)
    files.close()
    cut: list[str] = []
    assert len(list(read_log([tmp_path], cut.append))) == 2
    assert len(cut) == 1 and cut[0].endswith("000001.jsonl:2")


def test_a_folder_that_is_lost_and_comes_back_gets_a_new_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "logs"
    log = DecisionLog(config(folder))
    log.write(finished(id="lost"))
    wait_until(lambda: folder.exists() and any(file.stat().st_size for file in folder.iterdir()))
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_text("something else is there now")
    log.write(finished())
    wait_until(lambda: log.dropped == 1)
    folder.unlink()
    log.write(finished(id="kept"))
    log.close()
    assert ids(folder) == ["kept"]
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]


def test_a_disk_that_fails_at_the_end_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module.os, "fsync", full)
    log = DecisionLog(config(tmp_path))
    log.write(finished())
    log.close()
    assert "No space left" in caplog.text and len(ids(tmp_path)) == 1


def test_an_old_file_that_cannot_be_removed_is_said_and_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "decisions-20000101T000000.000000Z-1-000001.jsonl").mkdir()
    (tmp_path / "decisions-20000101T000000.000000Z-1-000002.jsonl").touch()
    files = RotatingFiles(tmp_path, "2", max_bytes=1, keep=1)
    files.append(b"x\n")
    files.close()
    assert "cannot be removed" in caplog.text and len(list(tmp_path.iterdir())) == 3


def test_a_newest_file_that_is_gone_already_is_not_locked(tmp_path: Path) -> None:
    assert not module._is_locked(tmp_path / "gone")


def _write_forever(folder: Path) -> None:
    log = DecisionLog(DecisionLogConfig(folder=folder))
    while True:
        log.write(finished())
        time.sleep(0.0005)


def test_a_killed_process_leaves_a_log_that_can_be_read(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write_forever, args=(tmp_path,), daemon=True)
    process.start()
    end = time.monotonic() + 60
    while sum(file.stat().st_size for file in tmp_path.iterdir()) < 100_000:
        assert time.monotonic() < end and process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    cut: list[str] = []
    assert len(list(read_log([tmp_path], cut.append))) > 50 and len(cut) <= 1


@pytest.mark.parametrize("length", [1, 10, 25, 400, -2])
def test_a_last_line_that_was_cut_is_left_out_and_told(tmp_path: Path, length: int) -> None:
    line = encode(finished(), texts=True)
    path = tmp_path / "log.jsonl"
    for whole in (0, 1, 3):
        path.write_bytes(line * whole + line[:length])
        cut: list[str] = []
        assert len(list(read_log([path], cut.append))) == whole
        assert cut == [f"{path}:{whole + 1}"]


def test_a_last_line_that_lacks_only_its_end_counts(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(encode(finished(), texts=True)[:-1])
    assert ids(tmp_path / "log.jsonl") == ["d-1"]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b'{"format":"coe-decision/1","id":\n', "this line is damaged"),
        (b'{"format":"coe-decision/1","id":"x"}\n', "field 'query' is missing"),
        (b"\xff\xfe\n", "this line is damaged"),
        (b'{"format":"coe-decision/9"}\n', "a decision log of format 'coe-decision/9', but this version reads"),
        (b'{"format":"parquet"}\n', "not a decision log"),
        (b'{"id":"custom"}\n', "not a decision log"),
        (b"[1,2]\n", "not a decision log"),
    ],
)
def test_a_bad_line_in_the_middle_is_an_error_with_its_place(tmp_path: Path, bad: bytes, why: str) -> None:
    line = encode(finished(), texts=True)
    path = tmp_path / "log.jsonl"
    path.write_bytes(line + bad + line)
    with pytest.raises(DecisionLogError) as error:
        ids(path)
    assert f"{path}:2: " in str(error.value) and why in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("select", "two"),
        ("select", {"kind": "top-k", "k": 0}),
        ("seed", 1.5),
        ("quality", [0.5]),
        ("utility", {"cost_weight": 1}),
    ],
)
def test_values_of_a_wrong_kind_are_an_error_not_another_decision(field: str, value: object) -> None:
    document = json.loads(encode(finished(), texts=False))
    document["inputs"][field] = value
    with pytest.raises(DecisionLogError, match="log.jsonl:4: this line is damaged"):
        decode(json.dumps(document).encode(), "log.jsonl:4")


def test_files_and_folders_that_are_no_log_are_named(tmp_path: Path) -> None:
    with pytest.raises(DecisionLogError, match="nope.jsonl: no such file"):
        ids(tmp_path / "nope.jsonl")
    with pytest.raises(DecisionLogError, match=r"contains no decision log \(no files decisions-\*\.jsonl\)"):
        ids(tmp_path)
    (tmp_path / "log.jsonl").touch()
    assert ids(tmp_path / "log.jsonl") == []
    with pytest.raises(DecisionLogError, match="cannot be read"):
        ids(tmp_path / "log.jsonl" / "below")


def test_bypassed_requests_are_logged_without_decision_inputs() -> None:
    entry = decode(encode(finished(routed=bypassed("good"), model="good"), texts=True), "here")
    assert entry.inputs is None and entry.policy is None
    assert entry.decision is not None and entry.decision.reason == "named by the request"
