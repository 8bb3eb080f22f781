"""The context constraint in a batch: rows go where there is room, as online."""

from __future__ import annotations

from pathlib import Path

from batch_runs import records, run, service, write_lines

ROOMY = '  - {name: roomy, kind: model, source: "fake://upper", size_bytes: 50}\n'


def test_the_room_for_the_answer_counts_and_the_fallback_answers_where_no_expert_has_it(tmp_path: Path) -> None:
    config = service(tmp_path, "{default: {expert: base, fallback: roomy}, alone: {expert: base}}")
    experts = tmp_path / "experts.yaml"
    experts.write_text(experts.read_text() + ROOMY)
    rows = [
        {"id": "short", "prompt": "hello there"},
        {"id": "answer", "prompt": "hello there", "max_tokens": 64},
        {"id": "prompt", "prompt": "hello there " * 40},
        {"id": "nobody", "prompt": "hello there", "max_tokens": 64, "model": "coe/alone"},
    ]
    write_lines(tmp_path / "in.jsonl", rows)
    run(config, tmp_path / "in.jsonl", tmp_path / "out")
    found = records(tmp_path / "out")
    assert {name: found[name]["expert"] for name in ("short", "answer", "prompt")} == {
        "short": "base",
        "answer": "roomy",
        "prompt": "roomy",
    }
    assert found["answer"]["answer"] == "HELLO THERE"
    assert "64 tokens for the answer do not fit its 64" in found["answer"]["notes"][0]
    assert "at least 80 tokens do not fit its 64" in found["prompt"]["notes"][0]
    assert not found["short"]["notes"]
    assert found["nobody"]["error"]["code"] == "context_length_exceeded"
