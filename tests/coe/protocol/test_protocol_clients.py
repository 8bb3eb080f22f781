"""Bodies that real clients send, as tests/clients/record.py recorded them: each is a valid request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coe.protocol.requests import parse_chat, parse_completion

RECORDED = [
    json.loads(line)
    for line in (Path(__file__).parent / "client_bodies.jsonl").read_text(encoding="utf-8").splitlines()
]
WITHOUT_EFFECT = {"metadata", "store", "stream_options.continuous_usage_stats", "user"}
"""What the recorded bodies have that is read and has no effect; `x-coe-warning` names it."""


@pytest.mark.parametrize("line", RECORDED, ids=[f"{line['client']}, {line['feature']}" for line in RECORDED])
def test_what_clients_send_is_a_request(line: dict[str, Any]) -> None:
    parse = parse_chat if line["path"].endswith("chat/completions") else parse_completion
    assert set(parse(line["body"]).ignored) <= WITHOUT_EFFECT


def test_the_recording_has_every_client() -> None:
    clients = {line["client"].rpartition(" ")[0] for line in RECORDED}
    assert {"openai-python", "LangChain", "pydantic-ai", "LiteLLM", "lm-eval", "guidellm", "vLLM bench"} <= clients
    assert len(clients) == 10
