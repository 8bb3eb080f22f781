"""guidellm: a short synchronous benchmark of each endpoint. COE_CLIENTS_TOKENIZER is as for lm-eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from feature import Endpoint, feature, main

REQUESTS: Final = 4
TOKENS: Final = 8


def _benchmark(at: Endpoint, path: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report, target = Path(folder) / "report.json", at.url.removesuffix("/v1")
        options = {
            "--backend": f"kind=openai_http,target={target},model={at.expert},request_format={path}",
            "--profile": "kind=synchronous",
            "--constraint": f"kind=max_requests,count={REQUESTS}",
            "--tokenizer": f"kind=hf_auto,model={os.environ['COE_CLIENTS_TOKENIZER']}",
            "--data": f"kind=synthetic_text,prompt_tokens=16,output_tokens={TOKENS}",
            "--output": f"kind=json,path={report}",
        }
        command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"]
        done = subprocess.run(
            [*command, *(word for option in options.items() for word in option)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        found: dict[str, Any] = json.loads(report.read_text())["benchmarks"][0]
    return found


def _check(at: Endpoint, path: str) -> None:
    metrics = _benchmark(at, path)["metrics"]
    totals = metrics["request_totals"]
    assert (totals["successful"], totals["errored"]) == (REQUESTS, 0), totals
    tokens = metrics["output_token_count"]["successful"]["mean"]
    assert at.scripted or tokens == TOKENS, tokens  # `ignore_eos` makes every answer that long


@feature("fixed length")
def chat(at: Endpoint) -> None:
    """Streams of chat answers that end at the asked length."""
    _check(at, "/v1/chat/completions")


@feature("completions")
def completions(at: Endpoint) -> None:
    _check(at, "/v1/completions")


if __name__ == "__main__":
    main("guidellm")
