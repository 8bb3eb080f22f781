"""Aggregation, chains and self-consistency in a batch: the same texts, tokens, costs and notes as online."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from batch_runs import InProcess, openai_row, records, run, save_router, service, write_lines

from coe.local import open_local
from coe.protocol.requests import parse_chat
from coe.types import Answer

POLICIES = """
  default: {router: router, composition: {kind: aggregate, aggregator: base, expert_deadline_s: 0.001}, k: 4}
  lost: {router: router, composition: {kind: aggregate, aggregator: broken}, k: 3}
  label: {router: router, composition: {kind: aggregate, aggregator: {sums: loud, default: base}}, k: 2}
  chain: {router: router, composition: {kind: chain, order: falling}, k: 4}
  samples: {router: router, composition: {kind: self-consistency, n: 3}}
"""
LONG = " ".join(f"word{i:02d}" for i in range(12))
BODIES: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "say 1", "coe": {"answers": True}},
    "long": {"prompt": LONG},
    "barred": {"prompt": "say 1", "coe": {"experts": ["loud", "tuned"]}},
    "lost": {"prompt": "say 1", "model": "coe/lost"},
    "label": {"prompt": "say 1", "model": "coe/label"},
    "chain": {"prompt": "say 1", "model": "coe/chain"},
    "samples": {"prompt": "say 1", "model": "coe/samples", "coe": {"answers": True}},
    "named": {"prompt": "say 1", "model": "loud", "coe": {"answers": True}},
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Experts in the order base, loud, tuned, flaky: base echoes, loud and tuned shout, flaky fails."""
    save_router(tmp_path / "router")
    service(tmp_path, POLICIES.replace(", expert_deadline_s: 0.001", ""))
    write_lines(tmp_path / "in.jsonl", [{"id": name, **body} for name, body in BODIES.items()])
    return tmp_path


async def online(place: Path, body: dict[str, Any]) -> Answer:
    chat = {key: value for key, value in body.items() if key != "prompt"}
    parsed = parse_chat({"model": "auto", **chat, "messages": [{"role": "user", "content": body["prompt"]}]})
    async with open_local(place / "service.yaml") as system:
        query = parsed.query_among(system.host.snapshot.experts)
        reply = system.answer(parsed.request, model=parsed.model, query=query)
        await reply.text()
        assert reply.answer is not None and reply.notes == reply.answer.notes
        return reply.answer


def test_a_batch_answers_as_online_with_the_same_notes_and_bill(place: Path) -> None:
    run(place / "service.yaml", place / "in.jsonl", place / "out", InProcess())
    rows = records(place / "out")
    assert {name: row["error"] for name, row in rows.items() if row["error"]} == {}
    for name, body in BODIES.items():
        answer, row = asyncio.run(online(place, body)), rows[name]
        assert (row["expert"], row["answer"]) == (answer.expert, answer.text), name
        assert (row["prompt_tokens"], row["completion_tokens"]) == (
            answer.usage.prompt_tokens,
            answer.usage.completion_tokens,
        )
        assert (row["cost_usd"], tuple(row["notes"])) == (answer.cost_usd, answer.notes), name
    failed = "flaky failed: EngineError: 'flaky' failed after 0 tokens, as its source 'fake://fail' specifies"
    assert rows["plain"]["notes"] == [failed] and rows["plain"]["answer"].startswith(
        "say 1\n\nExperts answered:\n1. say 1"
    )
    [_, cut] = rows["long"]["notes"]
    assert cut == (
        "the aggregator saw the first 29 characters of the answers of base, loud, tuned: "
        "the context of base holds 64 tokens"
    )
    assert rows["long"]["answer"].count("[cut]") == 3
    assert (
        rows["barred"]["notes"][0].startswith("base could not aggregate: NotAllowed")
        and rows["barred"]["answer"] == "SAY 1"
    )
    assert rows["lost"]["notes"] == [
        "broken could not aggregate: WeightsError; the answer is the majority of the experts"
    ]
    assert rows["label"]["expert"] == "base" and rows["named"]["notes"] == []
    assert rows["chain"]["notes"] == [failed]


def test_the_deadline_of_an_expert_does_not_count_in_a_batch(place: Path) -> None:
    service(place, POLICIES)  # a thousandth of a second for each
    write_lines(place / "in.jsonl", [{"id": "plain", **BODIES["plain"]}])
    run(place / "service.yaml", place / "in.jsonl", place / "out", InProcess())
    assert len(records(place / "out")["plain"]["notes"]) == 1  # the failure of flaky


def test_the_result_has_all_answers_if_the_row_requests_them(place: Path) -> None:
    rows = [
        openai_row(name, "say 1", "coe/lost", **({"coe": {"answers": True}} if name == "all" else {}))
        for name in ("all", "one")
    ]
    write_lines(place / "in.jsonl", [*rows, *({"id": name, **BODIES[name]} for name in ("plain", "samples", "long"))])
    run(place / "service.yaml", place / "in.jsonl", place / "out", InProcess())
    found = records(place / "out")
    assert found["long"]["answers"] is None is found["one"]["answers"]
    said = found["plain"]["answers"]
    assert [(each["call"], each["expert"], each["text"]) for each in said[:4]] == [
        ("0.0", "base", "say 1"),
        ("0.1", "loud", "SAY 1"),
        ("0.2", "tuned", "[tuned] SAY 1"),
        ("0.3", "flaky", None),
    ]
    assert said[3]["error"]["code"] == "engine_error" and said[3]["text"] is None and said[4]["call"] == "1.aggregator"
    assert sum(each["usage"]["prompt_tokens"] for each in said if each["usage"]) == found["plain"]["prompt_tokens"]
    assert [each["call"] for each in found["samples"]["answers"]] == ["0.0", "0.1", "0.2"]
    lines = {
        line["custom_id"]: line["response"]["body"]
        for line in map(json.loads, (place / "out/results.jsonl").read_text().splitlines())
    }
    assert lines["one"]["coe"] == {"notes": found["one"]["notes"]}
    first, *_, last = lines["all"]["coe"]["answers"]
    assert first["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4} and first["error"] is None
    assert last["expert"] == "broken" and last["usage"] is None and last["error"]["code"] == "invalid_weights"


def test_the_second_stage_is_grouped_by_aggregator(place: Path) -> None:
    executor = InProcess()
    rows = [{"id": str(i), "prompt": f"say {i}", "model": model} for i in range(4) for model in ("auto", "coe/lost")]
    write_lines(place / "in.jsonl", rows)
    run(place / "service.yaml", place / "in.jsonl", place / "out", executor)
    assert sorted(executor.items[1]) == [("base",), ("broken",)]
