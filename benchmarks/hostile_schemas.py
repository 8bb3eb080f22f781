"""A request to an `hf` expert beside another one with a hostile JSON schema, through `coe serve`.

    python benchmarks/hostile_schemas.py MODEL_DIR [--schemas NAME ...] [--rounds 5] [--json PATH]

Each round sends a normal request together with others to the same expert: an ordinary schema, then the hostile one,
each new to the expert. The ratio compares the two times of the normal request in adjacent runs; all answers have the
same `max_tokens`. Normal requests are without a schema, with one that is kept, and with one that is new.

    answer  status, seconds alone, and the error or finish reason      ratio  median (lowest to highest)
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
from grammar_cases import HOSTILE, SCHEMAS, having
from load_client import free_port, open_session, serving

SERVICE = """
experts: [experts.yaml]
engines: {{hf: {{threads: 1}}}}
policies: {{default: {{expert: expert}}}}
serve: {{port: {port}}}
"""
MORE: dict[str, Callable[[], str]] = {
    "a keyword that is not supported": lambda: having({"not": {"type": "string"}}),
    "recursive, without an end": lambda: json.dumps(
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False}
    ),
    "recursive, with one": lambda: having({"$ref": "#/$defs/tree"}),
    "90 levels": lambda: '{"items":' * 80 + "{}" + "}" * 80,
    "256 kB of properties": lambda: having({"properties": {f"p{i:05}": {"type": "string"} for i in range(8_000)}}),
    "minItems 10^5": lambda: having({"type": "array", "items": {"type": "integer"}, "minItems": 10**5}),
    "maxItems 10^9": lambda: having({"type": "array", "items": {"type": "integer"}, "maxItems": 10**9}),
}
LEFT_OUT = {"10,000 levels", "200 levels"}  # more than the levels of a body
numbers = itertools.count()


def body(schema: Any, n_tokens: int) -> bytes:
    asked: dict[str, Any] = {"model": "expert", "messages": [{"role": "user", "content": "Describe a player as JSON."}]}
    asked |= {"max_tokens": n_tokens, "temperature": 1, "seed": 1}
    if schema is not None:
        asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return json.dumps(asked).encode()


def new(schema: Any) -> Any:
    """The schema as another text, so that it is not one that is kept."""
    return {**schema, "title": f"new {next(numbers)}"}


async def ask(session: aiohttp.ClientSession, url: str, asked: bytes) -> tuple[float, int, str]:
    """Seconds, status, and the error or finish reason."""
    began = time.perf_counter()
    async with session.post(f"{url}/v1/chat/completions", data=asked) as response:
        answer = await response.json()
    error = answer.get("error")
    return (
        time.perf_counter() - began,
        response.status,
        error["message"] if error else answer["choices"][0]["finish_reason"],
    )


async def measure(given: argparse.Namespace, url: str) -> list[dict[str, Any]]:
    flat, rows = SCHEMAS["flat"], []
    normal: dict[str, Callable[[], Any]] = {"plain": lambda: None, "kept": lambda: flat, "new": lambda: new(flat)}
    hostile = {name: make for name, make in {**MORE, **HOSTILE}.items() if name not in LEFT_OUT}
    async with open_session() as session:

        async def beside(others: list[bytes], asked: bytes) -> float:
            """Seconds of a request that is sent just after others."""
            tasks = [asyncio.create_task(ask(session, url, other)) for other in others]
            await asyncio.sleep(0.05)
            seconds, status, said = await ask(session, url, asked)
            if status != 200:
                raise RuntimeError(f"the normal request got {status}: {said}")
            await asyncio.gather(*tasks)
            return seconds

        for _ in range(3):
            await ask(session, url, body(flat, given.tokens))
        for name in given.schemas or hostile:
            schema = json.loads(hostile[name]())
            seconds, status, said = await ask(session, url, body(new(schema), given.tokens))
            row: dict[str, Any] = {"schema": name, "status": status, "seconds": seconds, "answer": said}
            ratios: dict[str, list[float]] = {f"{kind}, {n}": [] for kind in normal for n in given.copies}
            for _, kind, n in itertools.product(range(given.rounds), normal, given.copies):
                ordinary = await beside(
                    [body(new(flat), given.tokens) for _ in range(n)], body(normal[kind](), given.tokens)
                )
                beside_it = await beside(
                    [body(new(schema), given.tokens) for _ in range(n)], body(normal[kind](), given.tokens)
                )
                ratios[f"{kind}, {n}"].append(beside_it / ordinary)
            rows.append({**row, "ratios": ratios})
            print(f"{name}: {status} after {seconds:.2f} s, {said:.150}", flush=True)
            for label, found in ratios.items():
                print(
                    f"    {label:<9} {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})", flush=True
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--schemas", nargs="+", choices=(*MORE, *HOSTILE))
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument(
        "--copies", type=int, nargs="+", default=[1, 4], help="hostile requests at once, each different"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        service = Path(folder) / "service.yaml"
        service.write_text(SERVICE.format(port=free_port()))
        source = given.model.absolute()
        experts = f"experts:\n  - {{name: expert, kind: model, source: '{source}'}}\n"
        (Path(folder) / "experts.yaml").write_text(experts)
        with serving(service) as url:
            rows = asyncio.run(measure(given, url))
    print(f"load average {os.getloadavg()}", file=sys.stderr)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
