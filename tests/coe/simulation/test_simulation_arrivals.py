"""Arrivals from files and generators: what is read, and what is refused with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from coe.errors import ConfigError
from coe.simulation.arrivals import by_name, by_zipf, poisson, read_azure, read_decision_log
from coe.simulation.workload import Machine, Workload, synthetic_experts

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


def test_a_trace_starts_at_zero_and_keeps_its_tokens(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        HEADER
        + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n\n2023-11-16 18:15:50.995169,0,0\n",
    )
    found = read_azure(path)
    assert found.at_s == [0.0, pytest.approx(4.314579), pytest.approx(4.314579)]
    assert (found.prompt_tokens, found.new_tokens) == ([374, 396, 0], [44, 109, 0])
    assert len(read_azure(path, most=1).at_s) == 1


def test_columns_may_be_in_another_order_beside_others(tmp_path: Path) -> None:
    found = read_azure(
        written(tmp_path, "GeneratedTokens,x,ContextTokens,TIMESTAMP\n7,,5,2024-05-10 00:00:00.1+00:00\n")
    )
    assert (found.prompt_tokens, found.new_tokens) == ([5], [7])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the trace is empty"),
        (HEADER, "the trace has no requests"),
        ("TIMESTAMP,ContextTokens\n", r"trace.csv:1: no column GeneratedTokens"),
        (HEADER + "2023-11-16 18:15:46,1\n", r"trace.csv:2: 2 fields, the header has 3"),
        (HEADER + "yesterday,1,1\n", r"trace.csv:2: 'yesterday' is no time"),
        (HEADER + "2023-11-16 18:15:46,-1,1\n", r"trace.csv:2: '-1' is no number of tokens"),
        (HEADER + "2023-11-16 18:15:46,1,1e3\n", r"trace.csv:2: '1e3' is no number of tokens"),
        (HEADER + f"2023-11-16 18:15:46,1,{10**9}\n", r"trace.csv:2: .* is no number of tokens"),
        (HEADER + "2023-11-16 18:15:46,1,1\n2023-11-16 18:15:45,1,1\n", r"trace.csv:3: .* sort the trace by time"),
        (HEADER + "0001-01-01,1,1\n9999-01-01,1,1\n", r"trace.csv:3: .* s after the first line"),
        (HEADER + '"2023-11-16 18:15:46,1,1\n', "is not CSV"),
    ],
)
def test_a_wrong_trace_is_refused_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_azure(written(tmp_path, text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.csv", tmp_path, tmp_path / "binary"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_azure(path)
    with pytest.raises(ConfigError, match="cannot be read: no such file or folder"):
        read_decision_log(tmp_path / "none.jsonl")


def line(time: str, expert: str | None, tokens: Any = 5, **fields: object) -> str:
    usage = {"prompt_tokens": 3, "completion_tokens": tokens}
    return json.dumps({"format": "coe-decision/1", "time": time, "expert": expert, "usage": usage, **fields}) + "\n"


def test_a_decision_log_gives_answered_requests_in_order_of_time(tmp_path: Path) -> None:
    later, sooner = line("2026-01-01T00:00:02+00:00", "b"), line("2026-01-01T00:00:00+00:00", "a", 9)
    path = written(tmp_path, later + sooner + line("2026-01-01T00:00:01+00:00", None, usage=None))
    found = read_decision_log(path)
    assert (found.at_s, found.experts, found.new_tokens) == ([0.0, 2.0], ["a", "b"], [9, 5])
    workload = by_name(found, lambda name: (name,), {"a": 1, "b": 2})
    assert [workload.residencies[want] for want in workload.wants] == [("a",), ("b",)]


def test_a_folder_is_the_log_of_all_its_gateways_in_order_of_time(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"this folder has no file decisions-\*\.jsonl"):
        read_decision_log(tmp_path)
    (tmp_path / "decisions-1.jsonl").write_text(
        line("2026-01-01T00:00:00", "a") + line("2026-01-01T00:00:02", "c") + line("2026-01-01T00:00:03", "d")[:30]
    )
    (tmp_path / "decisions-2.jsonl").write_text(line("2026-01-01T00:00:01", "b") + '{"format": ')
    (tmp_path / "other.txt").write_text("not a log\n")
    found = read_decision_log(tmp_path)
    assert (found.at_s, found.experts) == ([0.0, 1.0, 2.0], ["a", "b", "c"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no request in this decision log was answered"),
        ("{\n", "trace.csv:1: not a line of a decision log"),
        ("[]\n", "trace.csv:1: not a line of a decision log"),
        (line("now", "a"), "trace.csv:1: not a line of a decision log"),
        (line("2026-01-01T00:00:00", "a", -1), "trace.csv:1: .* tokens are not numbers"),
        (line("2026-01-01T00:00:00", "a", format="x"), "trace.csv:1: .* its format"),
        (
            line("2026-01-01T00:00:00", "a") + '{"format": "coe-decision/1"}\n',
            "trace.csv:2: .* field 'usage' is missing",
        ),
    ],
)
def test_a_wrong_log_is_refused_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_decision_log(written(tmp_path, text))


def test_an_incomplete_last_line_is_skipped_and_a_complete_one_without_its_end_counts(tmp_path: Path) -> None:
    whole, next_line = line("2026-01-01T00:00:00", "a"), line("2026-01-01T00:00:01", "b")
    for length in range(len(next_line) - 1):
        assert read_decision_log(written(tmp_path, whole + next_line[:length])).experts == ["a"]
    assert read_decision_log(written(tmp_path, whole + next_line[:-1])).experts == ["a", "b"]
    with pytest.raises(ConfigError, match=r"trace.csv:1: not a line"):
        read_decision_log(written(tmp_path, next_line[:40] + "\n" + whole))
    with pytest.raises(ConfigError, match="no request in this decision log was answered"):
        read_decision_log(written(tmp_path, whole[:40]))


def test_generated_arrivals_repeat_and_have_their_means() -> None:
    found = poisson(20_000, 4.0, 100, 50, seed=1)
    assert found == poisson(20_000, 4.0, 100, 50, seed=1) != poisson(20_000, 4.0, 100, 50, seed=2)
    assert found.at_s == sorted(found.at_s) and found.at_s[0] == 0.0
    assert len(found.at_s) / found.at_s[-1] == pytest.approx(4.0, rel=0.05)
    assert sum(found.prompt_tokens) / 20_000 == pytest.approx(100, rel=0.05)
    workload = by_zipf(found, *synthetic_experts(10, 7), exponent=1.0, seed=3)
    counts = [workload.wants.count(number) for number in range(10)]
    assert counts[0] / counts[3] == pytest.approx(4.0, rel=0.15)
    assert workload.shares["expert-0"] == counts[0] / 20_000


def test_another_rate_keeps_the_order_and_the_shape() -> None:
    workload = Workload([("a",)], {"a": 1}, [0.0, 1.0, 4.0, 5.0], [0] * 4, [1] * 4, [1] * 4)
    assert workload.at_rate(1.6).at_s == [0.0, 0.5, 2.0, 2.5]
    with pytest.raises(ConfigError, match="arrive at the same time"):
        Workload([("a",)], {"a": 1}, [0.0, 0.0], [0, 0], [1, 1], [1, 1]).at_rate(1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"device_bytes": 0},
        {"device_bytes": -5},
        {"bytes_per_s": 0.0},
        {"bytes_per_s": float("nan")},
        {"load_fixed_s": -1.0},
        {"prompt_tokens_per_s": 0.0},
        {"new_tokens_per_s": float("inf")},
        {"places": 0},
    ],
)
def test_sizes_and_rates_are_bounded(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is not between"):
        Machine(**{"device_bytes": 10, "bytes_per_s": 1.0, **wrong})
    with pytest.raises(ConfigError, match="is not between"):
        synthetic_experts(0, 1)
    with pytest.raises(ConfigError, match="is not between"):
        synthetic_experts(1, -1)


def test_an_expert_larger_than_the_device_is_refused() -> None:
    workload = Workload([("a", "b")], {"a": 6, "b": 6}, [0.0], [0], [1], [1])
    with pytest.raises(ConfigError, match=r"a \+ b has 12 bytes, more than the device \(10\)"):
        Machine(10, 1.0).check(workload)
