"""What traces and JSON logs cost a gateway: the same API with and without, side by side.

    python benchmarks/observability.py [--ways traces all] [--clients 1 16 64] [--seconds 3] [--rounds 5] [--json PATH]

Each way is a process with the API and a host with one fake expert that answers at once, so that nearly all time is
theirs. A collector in a process of its own receives the spans.

    off        no key, no traces, text logs
    traces     spans of every request are exported over OTLP
    sampled    a tenth of the requests is traced (OTEL_TRACES_SAMPLER=parentbased_traceidratio)
    json       JSON logs with an access line for each request, to a file
    limited    a key with limits of requests, tokens and USD, in a registry in SQLite
    all        traces, JSON logs, and that key
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import psutil
from keys import expert_service, headers_for, measure, table
from load_client import free_port

WAYS: Final = ("off", "traces", "sampled", "json", "limited", "all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["off", "traces", "json", "all"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each way in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--serve", nargs=4, metavar=("WAY", "PORT", "URL", "LOG"), help=argparse.SUPPRESS)
    parser.add_argument("--collect", type=int, metavar="PORT", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        way, port, url, log = given.serve
        asyncio.run(serve(way, int(port), url, Path(log)))
    elif given.collect:
        asyncio.run(collect(given.collect))
    else:
        ways = list(dict.fromkeys(["off", *given.ways]))
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            collector = stack.enter_context(collecting())
            served = {way: stack.enter_context(serving(way, Path(folder), collector)) for way in ways}
            found = asyncio.run(measure(given, served))
        print(table(found, base="off"))
        if given.json is not None:
            given.json.write_text(json.dumps(found, indent=2) + "\n")


async def serve(way: str, port: int, url: str, log: Path) -> None:
    """The API on a port, with traces and logs as the way says, until it is terminated."""
    import logging

    import uvicorn

    from coe.serve.http.api import build_api
    from coe.telemetry.export import start
    from coe.telemetry.json_logs import use_json

    start(None, f"benchmark-{way}", "gateway")
    if way in ("json", "all"):
        handler = logging.FileHandler(log)
        use_json([handler])
        ours = logging.getLogger("coe")
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
    app = build_api(expert_service(url))
    config = uvicorn.Config(app, port=port, log_level="critical", ws="none", lifespan="off", log_config=None)
    await uvicorn.Server(config).serve()


async def collect(port: int) -> None:
    """Accept spans and forget them."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    async with await asyncio.start_server(handle, "127.0.0.1", port) as server:
        await server.serve_forever()


@contextmanager
def collecting() -> Iterator[str]:
    """The URL of a collector in a process of its own."""
    port = free_port()
    process = subprocess.Popen([sys.executable, __file__, "--collect", str(port)], stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def serving(way: str, folder: Path, collector: str) -> Iterator[tuple[str, dict[str, str], psutil.Process]]:
    """The API in a process of its own: its URL, the headers of a request, and the process."""
    port, url = free_port(), f"sqlite:///{folder / f'{way}.db'}"
    headers = headers_for("limited" if way in ("limited", "all") else "open", url)
    traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector} if way in ("traces", "sampled", "all") else {}
    if way == "sampled":
        traced |= {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.1"}
    plain = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    command = [sys.executable, __file__, "--serve", way, str(port), url, str(folder / f"{way}.log")]
    process = subprocess.Popen(command, env=plain | traced | {"OMP_NUM_THREADS": "1"})
    try:
        yield f"http://127.0.0.1:{port}/v1/chat/completions", headers, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
