"""`coe replay`: decisions of a real router, logged, replayed, tampered with, and routed again."""

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coe.cli.app import main
from coe.config import load_config
from coe.local import open_local
from coe.orchestrator import query_of
from coe.serve.decisions.entry import encode
from coe.serve.http.finished import Finished
from coe.types import GenerateRequest
from routers.artifacts import save
from routers.base import Message
from routers.kinds.baselines import RandomRouter
from routers.outcomes.table import OutcomeTable

EXPERTS = """
experts:
  - {name: loud, kind: model, source: "fake://upper", context_length: 512}
  - {name: calm, kind: model, source: "fake://echo", context_length: 512}
"""
POLICIES = "policies: {default: {router: router, k: 2}, named: {expert: loud}}\n"
N = 40


def train(folder: Path, seed: int) -> None:
    """A random router: the same query always gets the same expert; another seed gives others."""
    table = OutcomeTable(("a", "b"), ("a", "b"), ("loud", "calm"), np.array([[1.0, 0.0], [0.0, 1.0]]))
    save(RandomRouter(seed=seed).fit(table), folder, table=table, encoder=None)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "experts.yaml").write_text(EXPERTS)
    train(tmp_path / "router", seed=1)
    path = tmp_path / "service.yaml"
    path.write_text(f"experts: [experts.yaml]\nhost: {{budget: 1GiB}}\n{POLICIES}")
    return path


def served(config: Path, *, texts: bool, models: tuple[str, ...] = ("auto",)) -> list[bytes]:
    """The log lines of N requests per model, answered by the whole system in this process."""
    return asyncio.run(_served(config, texts, models))


async def _served(config: Path, texts: bool, models: tuple[str, ...]) -> list[bytes]:
    lines = []
    async with open_local(load_config(config)) as system:
        for i, model in ((i, model) for i in range(N) for model in models):
            request = GenerateRequest(messages=(Message("user", f"question {i}"),))
            reply = system.answer(request, model=model, query=query_of(request))
            await reply.text()
            finished = Finished(
                id=f"{model}-{i}",
                endpoint="/v1/chat/completions",
                model=model,
                routed=reply.routed,
                expert=reply.expert,
                answer=reply.answer,
                error=None,
                status=200,
                streamed=False,
                seed=None,
                registry_version=1,
                started_at=0.0,
                route_s=0.001,
                first_s=0.002,
                total_s=0.003,
            )
            lines.append(encode(finished, texts=texts))
    return lines


@dataclass
class Ended:
    status: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.stdout)
        return document


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """The command as the shell starts it, in this process."""

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["coe", "replay", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return call


def test_a_log_replays_identically(config: Path, tmp_path: Path, run: Callable[..., Ended]) -> None:
    lines = served(config, texts=False, models=("auto", "coe/named", "calm"))
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines))
    done = run(tmp_path / "log.jsonl")
    assert done.status == 0 and "120 entries replayed" in done.stdout
    counts = [line.split("│")[1:3] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [[part.strip() for part in count] for count in counts] == [
        ["80", "decided identically"],
        ["0", "decided differently"],
        ["40", "named their expert: no decision"],
        ["0", "failed before a decision"],
    ]


def test_a_folder_of_logs_is_replayed_and_json_says_all(
    config: Path, tmp_path: Path, run: Callable[..., Ended]
) -> None:
    lines = served(config, texts=False)
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "decisions-1.jsonl").write_bytes(b"".join(lines[:30]))
    (logs / "decisions-2.jsonl").write_bytes(b"".join(lines[30:]) + lines[0][:50])
    done = run(logs, "--json", "-")
    assert done.status == 0
    cut = f"{logs / 'decisions-2.jsonl'}:11"
    expected = {"entries": N, "repeated": N, "differing": 0, "named": 0, "refused": 0, "differences": []}
    assert done.document == {**expected, "cut": [cut], "rerouted": None}
    assert f"{cut}: the last line is incomplete and was skipped" in done.stderr


def test_tampered_lines_are_shown_and_fail_the_command(config: Path, tmp_path: Path, run: Callable[..., Ended]) -> None:
    documents = [json.loads(line) for line in served(config, texts=False)]
    documents[7]["decision"]["confidence"] = 0.123
    for document in documents[10:]:
        document["decision"]["reason"] = "[red]forged[/]"
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(document) + "\n" for document in documents))
    done = run(log, "--json", tmp_path / "report.json")
    assert done.status == 1
    assert "auto-7" in done.stdout and "0.123" in done.stdout and "[red]forged[/]" in done.stdout
    assert "and 11 more" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["repeated"], report["differing"], len(report["differences"])) == (9, 31, 31)
    first = report["differences"][0]
    assert (first["place"], first["id"], first["field"], first["logged"]) == (f"{log}:8", "auto-7", "confidence", 0.123)


def test_routed_again_by_the_same_router_nothing_changes(
    config: Path, tmp_path: Path, run: Callable[..., Ended]
) -> None:
    (tmp_path / "log.jsonl").write_bytes(b"".join(served(config, texts=True, models=("auto", "coe/named"))))
    rerouted = run(tmp_path / "log.jsonl", "--config", config, "--json", "-").document["rerouted"]
    same = {"routed": N, "same_choice": N, "same_router": N, "no_eligible_expert": 0, "largest_drift": 0.0}
    assert rerouted == {"policies": {"default": same, "named": same}, "without_text": 0, "unknown_policy": 0}


def test_routed_again_by_another_router_the_changes_are_reported(
    config: Path, tmp_path: Path, run: Callable[..., Ended]
) -> None:
    lines = served(config, texts=True, models=("auto", "coe/named"))
    lines += served(config, texts=False)
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines))
    train(tmp_path / "router", seed=2)
    config.write_text(config.read_text().replace(", named: {expert: loud}", ""))
    done = run(tmp_path / "log.jsonl", "--config", config, "--json", tmp_path / "report.json")
    assert done.status == 0, "the logged decisions themselves come out the same"
    rerouted = json.loads((tmp_path / "report.json").read_text())["rerouted"]
    of = rerouted["policies"]["default"]
    assert (of["routed"], of["same_router"], of["no_eligible_expert"]) == (N, 0, 0)
    assert 0 < of["same_choice"] < N and of["largest_drift"] is not None
    assert (rerouted["without_text"], rerouted["unknown_policy"]) == (N, N)
    assert "same choice" in done.stdout and f"{N} entries were logged without their text: not routed" in done.stdout
    assert f"{N} entries belong to policies that the configuration does not have" in done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "log.jsonl: no such file"),
        ('{"custom_id": "1"}\n', "log.jsonl:1: not a decision log"),
        ('{"format": "coe-decision/2"}\n', "log.jsonl:1: a decision log of format 'coe-decision/2'"),
        ('{"format": "coe-decision/1"\n', "log.jsonl:1: this line is damaged"),
    ],
)
def test_mistakes_get_one_clear_line(
    tmp_path: Path, content: str | None, message: str, run: Callable[..., Ended]
) -> None:
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    done = run(tmp_path / "log.jsonl")
    assert done.status == 1 and done.stdout == ""
    assert "error: " in done.stderr and message in done.stderr and "Traceback" not in done.stderr


def test_long_logs_say_how_far_they_are(config: Path, tmp_path: Path, run: Callable[..., Ended]) -> None:
    (tmp_path / "log.jsonl").write_bytes(b"".join(served(config, texts=False)) * 30)
    done = run(tmp_path / "log.jsonl", "--json", "-")
    assert done.status == 0 and done.document["repeated"] == 30 * N
