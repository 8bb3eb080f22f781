"""`coe plan --from-log`: the memory that the requests of a decision log need."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from coe.cli.app import app

EXPERTS = """experts:
  - {name: a, kind: model, source: 'fake://echo', size_bytes: 8000000}
  - {name: b, kind: model, source: 'fake://echo', size_bytes: 4000000}
  - {name: c, kind: adapter, base: b, source: 'fake://echo'}
  - {name: far, kind: remote, source: 'https://example.com/v1', context_length: 4096}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "experts.yaml").write_text(EXPERTS)
    path = tmp_path / "coe.yaml"
    path.write_text("experts: [experts.yaml]\nhost: {budget: 10000000}\n")
    return path


def line(expert: str, second: int, *, load_s: float = 0.0, tokens: int = 20) -> str:
    document = {
        "format": "coe-decision/1",
        "time": f"2026-01-01T00:{second // 60:02}:{second % 60:02}",
        "expert": expert,
        "usage": {"prompt_tokens": 10, "completion_tokens": tokens},
        "latency_s": {"queue": 0.0, "load": load_s, "engine": 2.0},
    }
    return json.dumps(document) + "\n"


def log_of(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(lines))
    return path


def plan(config: Path, *arguments: str, succeeds: bool = True) -> Any:
    found = CliRunner().invoke(app, ["plan", "--config", str(config), *arguments])
    assert (found.exit_code == 0) == succeeds, found.output
    return found


def record(config: Path, log: Path, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan(config, "--from-log", str(log), *arguments, "--json", "-").stdout)
    return found


def test_sizes_from_the_largest_weights_to_all_with_rates_of_the_log(config: Path, tmp_path: Path) -> None:
    log = log_of(
        tmp_path, *(line("abc"[i % 3], 20 * i, load_s=2.0 if i < 2 else 0.0) for i in range(12)), line("far", 9)
    )
    found = record(config, log)
    assert (found["requests"], found["experts"], found["weights"]) == (12, 3, 2)
    assert found["left_out"] == {"requests": 1, "experts": ["far"]}
    assert found["load_bytes_per_s"] == 3_000_000  # the median of 8 and 4 MB in 2 s
    assert found["tokens_per_s"] == 10.0
    small, budget, whole = found["sizes"]
    assert [size["device_bytes"] for size in found["sizes"]] == [8_000_000, 10_000_000, 12_000_000]
    assert small["loads"] == budget["loads"] == 8  # b serves c, too
    assert whole["loads"] == 2 and whole["hit_rate"] == whole["best_hit_rate"] == pytest.approx(10 / 12)
    assert found["least_bytes"] == 8_000_000
    assert record(config, log, "--ttft-limit", "0.001")["least_bytes"] is None


def test_the_table_names_the_budget_and_what_is_left_out(config: Path, tmp_path: Path) -> None:
    log = log_of(tmp_path, line("a", 0), line("b", 30), line("far", 40))
    shown = " ".join(plan(config, "--from-log", str(log), "--load-rate", "1MB").stdout.split())
    assert "(host.budget)" in shown
    assert "Left out: 1 request to experts without weights in this configuration (far)." in shown
    assert "one process for each set of weights would be 1 more" in shown
    one = plan(config, "--from-log", str(log_of(tmp_path, line("a", 0))), "--load-rate", "1MB").stdout
    assert "1 request to 1 expert (1 set of weights)" in " ".join(one.split())


def test_a_rate_that_the_log_does_not_show_must_be_given(config: Path, tmp_path: Path) -> None:
    log = log_of(tmp_path, line("a", 0), line("a", 1))
    refused = plan(config, "--from-log", str(log), succeeds=False)
    assert "no request of this log shows the rate of --load-rate: give it" in str(refused.exception)
    assert record(config, log, "--load-rate", "4MB")["load_bytes_per_s"] == 4_000_000


@pytest.mark.parametrize("arguments", [(), ("--input", "rows.jsonl", "--from-log", "log.jsonl")])
def test_a_batch_or_a_log_is_planned(config: Path, arguments: tuple[str, ...]) -> None:
    refused = plan(config, *arguments, succeeds=False)
    assert refused.exit_code == 2
    assert "give one of --input" in refused.output


def test_a_folder_is_planned_as_its_files_together(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "decisions"
    folder.mkdir()
    lines = [line("ab"[i % 2], 20 * i, load_s=2.0) for i in range(6)]
    for gateway in (0, 1):
        (folder / f"decisions-{gateway}.jsonl").write_text("".join(lines[gateway::2]))
    assert record(config, folder) == record(config, log_of(tmp_path, *lines))


def test_a_log_of_remote_experts_only_needs_no_memory(config: Path, tmp_path: Path) -> None:
    refused = plan(config, "--from-log", str(log_of(tmp_path, line("far", 0))), succeeds=False)
    assert "no expert of this log has weights of a known size" in str(refused.exception)


def test_experts_are_placed_on_hosts_as_pools(config: Path, tmp_path: Path) -> None:
    log = log_of(tmp_path, *(line("aab"[i % 3], 30 * i, load_s=2.0) for i in range(9)))
    found = record(config, log, "--hosts", "2")["hosts"]
    assert sorted(found["weights"]) == [["a"], ["b"]]  # 8 and 4 MB, 10 MB each: both fit none
    assert found["missing"] == pytest.approx(0) and sum(found["loads"]) == pytest.approx(1)
    shown = plan(config, "--from-log", str(log), "--hosts", "2").stdout
    pools = yaml.safe_load(shown[shown.index("serve:") :])["serve"]["pools"]
    assert [pool["experts"] for pool in pools] == found["experts"]
    assert sorted(found["experts"]) == [["a"], ["b", "c", "far"]]  # the adapter with its base; the rest with least work
    shown = plan(config, "--from-log", str(log), "--hosts", "5").stdout
    pools = yaml.safe_load(shown[shown.index("serve:") :])["serve"]["pools"]
    assert 2 <= len(pools) <= 5 and all(pool["experts"] for pool in pools)
    config.write_text("experts: [experts.yaml]\n")
    refused = plan(config, "--from-log", str(log), "--hosts", "2", succeeds=False)
    assert "--hosts needs `host.budget`" in str(refused.exception)
