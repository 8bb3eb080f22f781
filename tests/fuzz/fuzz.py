"""Send thousands of valid and invalid requests, generated from /openapi.json, to the API.

    python tests/fuzz/fuzz.py --st .fuzz-venv/bin/st [--url http://127.0.0.1:8000] [--cases 10000] [--endpoint ...]

Without --url a gateway with fake experts is started. `st` is the command of schemathesis. A case fails if the status is
a 5xx or not a documented one, if a body does not satisfy its schema, if a stream does not end as it should
(`fuzz_hooks.py`), or if the answer takes longer than --timeout seconds. The exit code is that of schemathesis.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
CHECKS: Final = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "stream_is_whole",
)
MOST_EVENTS: Final = 1_000_000
"""Most events of a stream that are read; without it, a stream is cut after 20 events and looks unfinished."""
ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/route", "/v1/embeddings")


def read(url: str) -> Any:
    """The JSON at a URL."""
    with urllib.request.urlopen(url, timeout=30) as response:
        return json.load(response)


def narrowed(document: dict[str, Any], models: list[str], endpoints: Sequence[str]) -> dict[str, Any]:
    """The document with names of `model` that exist, since others end at 404, streams, and long deadlines."""
    for name in ("ChatRequest", "CompletionRequest", "ResponseRequest"):
        schema = document["components"]["schemas"][name]
        schema["properties"] |= {"model": {"enum": models}, "stream": {"type": "boolean"}}
        schema["required"].append("stream")
    schemas = document["components"]["schemas"]
    schemas["EmbeddingRequest"]["properties"]["model"] = {"enum": models}
    for name in ("Extension", "EmbeddingExtension"):
        if "deadline_s" in schemas[name]["properties"]:
            schemas[name]["properties"]["deadline_s"] = {"type": "number", "minimum": 60}
    document["paths"] = {path: document["paths"][path] for path in endpoints}
    return document


def command(given: argparse.Namespace, url: str, document: Path) -> list[str]:
    """The run of schemathesis."""
    return [
        str(given.st.absolute()),
        "run",
        str(document),
        f"--url={url}",
        f"--checks={','.join(CHECKS)}",
        "--phases=coverage,fuzzing",
        "--mode=all",
        f"--max-examples={-(-given.cases // len(given.endpoint))}",
        f"--request-timeout={given.timeout}",
        f"--max-response-time={given.timeout}",
        f"--seed={given.seed}",
        f"--workers={given.workers}",
        "--continue-on-failure",
        "--suppress-health-check=all",
        "--generation-database=none",
        "--no-color",
    ]


async def fuzz(given: argparse.Namespace, url: str) -> int:
    """Run against a URL; returns the exit code."""
    models = [model["id"] for model in (await asyncio.to_thread(read, f"{url}/v1/models"))["data"]]
    document = narrowed(await asyncio.to_thread(read, f"{url}/openapi.json"), models, given.endpoint)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "openapi.json"
        path.write_text(json.dumps(document))
        (Path(folder) / "schemathesis.toml").write_text(f"max-stream-events = {MOST_EVENTS}\n")
        environment = os.environ | {"SCHEMATHESIS_HOOKS": "fuzz_hooks", "PYTHONPATH": str(HERE)}
        process = await asyncio.create_subprocess_exec(*command(given, url, path), env=environment, cwd=folder)
        return await process.wait()


async def over_fakes(given: argparse.Namespace) -> int:
    """Run against a gateway of this process, whose experts are fakes that do not fail."""
    sys.path[:0] = [str(HERE.parent / "support"), str(HERE.parents[1])]
    from api_server import expert, gateway

    from registry.spec import Kind

    able = frozenset(
        {"chat", "tools", "json", "json_schema", "logprobs", "prompt_logprobs", "token_prompts", "sampling"}
    )
    experts = (
        expert("echo"),
        expert("upper", "fake://upper", capabilities=able),
        expert("short", context_length=16),
        expert("vectors", kind=Kind.EMBEDDING, capabilities=frozenset({"embedding"})),
    )
    async with gateway(experts=experts) as running:
        code = await fuzz(given, running.url)
        lines = [line for line in running.log.lines if "-" not in line.id]  # one for each request with several prompts
        kinds = Counter(f"{line.endpoint} {line.status}{' stream' if _is_stream(line) else ''}" for line in lines)
    for kind, count in sorted(kinds.items()):
        print(f"{count:6} {kind}")
    print(f"slowest answer: {max(line.total_s for line in lines):.2f} s")
    return code


def _is_stream(line: Any) -> bool:
    return line.streamed and line.status == 200 and line.endpoint != "/v1/route"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--st", type=Path, required=True, help="the command of schemathesis")
    parser.add_argument("--url", help="of a running service; default: a gateway with fake experts")
    parser.add_argument("--cases", type=int, default=10_000, help="requests in all, at least")
    parser.add_argument("--timeout", type=float, default=30.0, help="most seconds for an answer")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--endpoint", nargs="+", choices=ENDPOINTS, default=ENDPOINTS)
    given = parser.parse_args()
    return asyncio.run(fuzz(given, given.url) if given.url else over_fakes(given))


if __name__ == "__main__":
    sys.exit(main())
