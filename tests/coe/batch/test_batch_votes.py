"""Compositions of several experts in a batch: the same answers as online, called stage by stage."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from batch_runs import InProcess, records, run, save_router, service, write_lines

from coe.local import open_local
from coe.types import GenerateRequest
from routers.base import Message

POLICIES = """
  default: {router: router, composition: vote, k: 3}
  early: {router: router, composition: {kind: cascade, confidence: 0.5}, k: 3}
  ill: {router: router, composition: weighted-vote, k: 4, fallback: base}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Experts in the order base, loud, tuned, flaky: loud answers as base, in capitals; flaky fails."""
    save_router(tmp_path / "router")
    service(tmp_path, POLICIES)
    models = ["auto", "coe/early", "coe/ill"]
    rows = [
        {"id": model.split("/")[-1] + f"-{i}", "model": model, "prompt": f"say {i}"} for model in models for i in (1, 2)
    ]
    write_lines(tmp_path / "in.jsonl", rows)
    return tmp_path


def test_votes_and_cascades_answer_as_they_do_online(place: Path) -> None:
    executor = InProcess()
    run(place / "service.yaml", place / "in.jsonl", place / "out", executor)
    rows = records(place / "out")
    assert {name: row["answer"] for name, row in rows.items()} == {
        "auto-1": "say 1",
        "auto-2": "say 2",
        "early-1": "say 1",
        "early-2": "say 2",
        "ill-1": "say 1",
        "ill-2": "say 2",
    }
    assert {row["expert"] for row in rows.values()} == {"base"} and not any(row["error"] for row in rows.values())
    # A fake counts words: two in and out, of three experts; the failing fourth of `ill` took none.
    assert {rows[f"{name}-1"]["prompt_tokens"] for name in ("auto", "ill")} == {6}
    assert rows["early-1"]["prompt_tokens"] == 2  # sure of the first one

    async def online(model: str) -> str:
        request = GenerateRequest(messages=(Message("user", "say 1"),))
        async with open_local(place / "service.yaml") as system:
            reply = system.answer(request, model=model)
            text = await reply.text()
            row = rows[model.split("/")[-1] + "-1"]
            assert reply.answer is not None and reply.expert == row["expert"]
            assert (reply.answer.usage.prompt_tokens, reply.answer.cost_usd) == (row["prompt_tokens"], row["cost_usd"])
            return text

    for model in ("auto", "coe/early", "coe/ill"):
        assert asyncio.run(online(model)) == "say 1"


def test_each_expert_is_loaded_once_for_all_votes(place: Path) -> None:
    executor = InProcess()
    run(place / "service.yaml", place / "in.jsonl", place / "out", executor)
    assert sorted(executor.items[0]) == sorted([("base", "tuned"), ("loud",), ("flaky",)])
