"""`coe simulate`: its rows, its plot, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coe.cli.app import app
from coe.memory.eviction import gdsf, look_ahead, lru
from coe.simulation.compare import Comparison, Row

SMALL = (
    "--requests",
    "60",
    "--expert-bytes",
    "10MB",
    "--device-bytes",
    "20MB",
    "--bandwidth",
    "40MB/s",
    "--experts",
    "5",
)


def simulate(*arguments: str, succeeds: bool = True) -> Any:
    found = CliRunner().invoke(app, ["simulate", *arguments])
    assert (found.exit_code == 0) == succeeds, found.output
    return found


def records(*arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(simulate(*arguments, "--json", "-").stdout)
    return found


def test_one_object_for_each_policy_and_the_same_again() -> None:
    found = records(*SMALL)
    assert [row["policy"] for row in found] == ["fcfs-lru", "coserve", "ours", "belady-arrival", "belady-ours"]
    for row in found:
        assert row["requests"] == 60 and row["experts"] == 5
        assert row["bytes_moved"] == row["loads"] * 10_000_000 and row["loads"] >= row["loads_bound"] >= 5
        assert 0 < row["ttft_p50_s"] <= row["ttft_p95_s"] <= row["makespan_s"] and row["goodput_per_s"] > 0
    assert records(*SMALL) == found != records(*SMALL, "--seed", "1")


def test_what_is_not_in_host_memory_comes_from_the_disk() -> None:
    [all_fit] = records(*SMALL, "--policy", "ours")
    assert all_fit["disk_reads"] == all_fit["bytes_from_disk"] == 0
    [roomy] = records(*SMALL, "--policy", "ours", "--host-bytes", "50MB", "--disk-bandwidth", "20MB/s")
    assert (roomy["disk_reads"], roomy["bytes_from_disk"]) == (5, 50_000_000)  # each expert once
    [tight] = records(*SMALL, "--policy", "ours", "--host-bytes", "10MB", "--disk-bandwidth", "1MB/s")
    assert tight["disk_reads"] > 5 and tight["bytes_from_disk"] == 10_000_000 * tight["disk_reads"]
    assert tight["ttft_p50_s"] > 2 * all_fit["ttft_p50_s"]


def test_a_trace_is_simulated_at_another_rate(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"2026-01-01 00:00:{second:02},100,{10 * second}" for second in range(10)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    [row] = records(*SMALL, "--trace", str(trace), "--policy", "ours", "--rate", "5")
    assert row["requests"] == 10 and row["rate_per_s"] == pytest.approx(5.0)
    [row] = records(*SMALL, "--trace", str(trace), "--policy", "ours", "--load", "0.5")
    assert row["requests"] == 10


def test_several_numbers_of_experts_are_printed_and_drawn(tmp_path: Path) -> None:
    plot, target = tmp_path / "plot.png", tmp_path / "rows.json"
    shown = simulate(*SMALL, "--experts", "2,4", "--devices", "--plot", str(plot), "--json", str(target)).stdout
    assert "2 experts" in shown and "4 experts: " in shown and "one expert on each takes 4" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(target.read_text())
    assert [row["experts"] for row in found] == [2] * 5 + [4] * 5
    assert {row["devices"] for row in found} <= {1, 2, 3, 4}


def test_the_experts_of_a_configuration_have_their_sizes(tmp_path: Path) -> None:
    config = tmp_path / "coe.yaml"
    config.write_text("experts: [experts.yaml]\n")
    (tmp_path / "experts.yaml").write_text(
        "experts:\n"
        "  - {name: a, kind: model, source: 'fake://echo', size_bytes: 3000000}\n"
        "  - {name: b, kind: model, source: 'fake://echo', size_bytes: 5000000}\n"
        "  - {name: c, kind: adapter, base: b, source: 'fake://echo'}\n"
    )
    [row] = records(*SMALL, "--config", str(config), "--policy", "ours")
    assert row["experts"] == 3 and row["loads"] == 2 and row["bytes_moved"] == 8_000_000
    log = tmp_path / "log.jsonl"
    line = {
        "format": "coe-decision/1",
        "time": "2026-01-01T00:00:00",
        "usage": {"prompt_tokens": 1, "completion_tokens": 1},
    }
    log.write_text(json.dumps({**line, "expert": "c"}) + "\n")
    [row] = records(*SMALL, "--config", str(config), "--policy", "ours", "--log", str(log))
    assert row["bytes_moved"] == 5_000_000
    log.write_text(json.dumps({**line, "expert": "gone"}) + "\n")
    refused = simulate(*SMALL, "--config", str(config), "--log", str(log), succeeds=False)
    assert "are not in" in refused.output and "gone" in refused.output


def test_a_configuration_has_the_defaults_of_memory_and_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float, object]] = []

    def rows(self: Comparison, *_: object) -> list[Row]:
        seen.append((self.machine.device_bytes, self.aging_s, self.eviction))
        return []

    monkeypatch.setattr(Comparison, "rows", rows)
    config = tmp_path / "service.yaml"
    experts = [f"  - {{name: e{n}, kind: model, source: 'fake://echo', size_bytes: 3000000}}\n" for n in range(3)]
    (tmp_path / "experts.yaml").write_text("experts:\n" + "".join(experts))
    host = "host: {budget: 4MB, aging_s: 3, eviction: lru}\n"
    ours, own = (4_000_000, 3.0, lru), ("--device-bytes", "6MB", "--aging-s", "5", "--eviction", "gdsf")
    for text, options, expected in (
        (host, (), ours),
        (f"{host}serve: {{pools: [{{name: a, budget: 8MB}}, {{name: b}}]}}\n", (), (8_000_000, *ours[1:])),
        (host, own, (6_000_000, 5.0, gdsf)),
        ("", (), (80 * 10**9, 10.0, look_ahead)),
    ):
        config.write_text(f"experts: [experts.yaml]\n{text}")
        simulate("--config", str(config), "--requests", "9", *options)
        assert seen.pop() == expected and not seen


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--expert-bytes", "-5GB"), "no number of bytes above 0"),
        (("--device-bytes", "0"), "no number of bytes above 0"),
        (("--bandwidth", "fast"), "no number of bytes above 0"),
        (("--host-bytes", "0"), "no number of bytes above 0"),
        (("--disk-bandwidth", "slow"), "no number of bytes above 0"),
        (("--expert-bytes", "9" * 400), "no number of bytes above 0"),
        (("--bandwidth", "55"), "55 bytes/s is less than 1 KiB/s; did you mean 55GB/s?"),
        (("--bandwidth", "55/s"), "did you mean 55GB/s?"),
        (("--disk-bandwidth", "1000"), "did you mean 1000GB/s?"),
        (("--device-bytes", "1.5kB"), "1,500 bytes is less than 1 MiB; did you mean 1.5GB?"),
        (("--expert-bytes", "13.5"), "did you mean 13.5GB?"),
        (("--host-bytes", "500"), "did you mean 500GB?"),
        (("--experts", "10,x"), "no number such as 150"),
        (("--experts", "0"), "numbers from 1"),
        (("--rate", "0"), "is not between"),
        (("--rate", "nan"), "is not between"),
        (("--rate", "1", "--load", "1"), "one of --rate and --load"),
        (("--trace", "a", "--log", "b"), "one of --trace and --log"),
        (("--seed", "-1"), "-1 is negative"),
        (("--eviction", "fifo"), "none of lru, gdsf, look-ahead"),
        (("--requests", "99999999999"), "is more than"),
    ],
)
def test_wrong_options_are_refused(arguments: tuple[str, ...], problem: str) -> None:
    found = simulate(*SMALL, *arguments, succeeds=False)
    assert found.exit_code == 2 and problem in " ".join(found.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--expert-bytes", "30MB"), "more than the device"),
        (("--batch-size", "0"), "places of an expert: 0 is not between"),
        (("--prefill-tokens", "0"), "prompt tokens between two new ones: 0 is not between"),
        (("--tokens-per-s", "0"), "new tokens per second: 0.0 is not between"),
        (("--policy", "best"), "no policy best"),
        (("--trace", "/nowhere.csv"), "cannot be read"),
    ],
)
def test_what_cannot_be_simulated_is_refused(arguments: tuple[str, ...], problem: str) -> None:
    found = simulate(*SMALL, *arguments, succeeds=False)
    assert problem in str(found.exception)
