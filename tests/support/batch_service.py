"""Files and batches of an in-process gateway: the child process of a batch is a thread here."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from api_server import EXPERTS, Gateway, gateway
from openai.types import Batch

from coe.config import Config, PolicyConfig, ServeConfig
from coe.serve.batches import runner, service
from coe.serve.batches.link import Message, Worker, decode, encode
from coe.serve.batches.service import Batches
from coe.serve.batches.worker import Link, serve
from coe.serve.http.keyring import Keyring
from coe.serve.http.ledger import Ledger
from registry.spec import ExpertSpec
from registry.store import Snapshot

POLICIES: Mapping[str, PolicyConfig] = {
    "default": PolicyConfig(expert="upper"),
    "safe": PolicyConfig(expert="broken", fallback="echo"),
}
runner.LOOK_S, runner.SAVE_S, service.POLL_S, service.RETRY_S = 0.02, 0.0, 0.05, 0.05  # type: ignore[misc]


class ThreadWorker:
    """A worker in a thread. It can die, as a process does, when the gateway closes it."""

    def __init__(self) -> None:
        inner_read, outer_write = os.pipe()
        outer_read, inner_write = os.pipe()
        self._to, self._from = os.fdopen(outer_write, "wb"), os.fdopen(outer_read, "rb")
        self._ends = os.fdopen(inner_read, "rb"), os.fdopen(inner_write, "wb")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @classmethod
    async def start(cls) -> Worker:
        return cls()

    def _serve(self) -> None:
        with suppress(OSError, EOFError, ValueError):
            serve(Link(*self._ends, ended=lambda: None))
        with suppress(OSError):
            self._ends[1].close()

    async def send(self, message: Message) -> None:
        def write() -> None:
            with suppress(OSError, ValueError):
                self._to.write(encode(message))
                self._to.flush()

        await asyncio.to_thread(write)

    async def receive(self) -> Message | None:
        line = await asyncio.to_thread(self._from.readline)
        return decode(line) if line else None

    async def close(self) -> None:
        with suppress(OSError):
            self._to.close()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._from.close)
        await asyncio.to_thread(self._ends[0].close)  # its reader has seen the end


@asynccontextmanager
async def batching(
    folder: Path,
    *,
    experts: Sequence[ExpertSpec] = EXPERTS,
    policies: Mapping[str, PolicyConfig] = POLICIES,
    given: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    keyring: Keyring | None = None,
    ledger: Ledger | None = None,
    start: Callable[[], Awaitable[Worker]] = ThreadWorker.start,
    **options: Any,
) -> AsyncIterator[Gateway]:
    """A gateway with files and batches in a folder.

    Args:
        given: settings of `serve.batches`. settings: others of `serve`.
        options: of `api_server.gateway`.
    """
    serve_settings = ServeConfig.model_validate({**(settings or {}), "batches": {"folder": folder, **(given or {})}})
    keys = keyring or Keyring()
    async with gateway(experts=experts, settings=dict(settings or {}), keyring=keys, ledger=ledger, **options) as there:
        batches = Batches(
            serve_settings, Config().engines, ask=there.host.ask, keyring=keys, ledger=ledger, start=start
        )
        batches.update(Snapshot(7, {spec.name: spec for spec in experts}), policies, "default")
        batches.start(lambda: there.service.in_flight > 0)
        there.service.batches = batches
        try:
            yield there
        finally:
            await batches.close()


def lines(*rows: Mapping[str, Any] | str) -> bytes:
    """A JSONL file; a text is written unchanged."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


async def upload(there: Gateway, content: bytes, name: str = "in.jsonl", **options: Any) -> str:
    """Upload a file; returns its id."""
    return (await there.client.files.create(file=(name, content), purpose="batch", **options)).id


async def create(there: Gateway, file_id: str, **options: Any) -> Batch:
    """Make a batch."""
    asked = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **options}
    return await there.client.batches.create(input_file_id=file_id, **asked)


async def ended(there: Gateway, batch_id: str, **options: Any) -> Batch:
    """The batch, once it has ended."""
    async with asyncio.timeout(60):  # a busy machine
        while True:
            batch = await there.client.batches.retrieve(batch_id, **options)
            if batch.status in ("completed", "failed", "cancelled", "expired"):
                return batch
            await asyncio.sleep(0.02)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.005)


async def read(there: Gateway, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of a result file by `custom_id`; fails if one is there twice."""
    assert file_id is not None
    text = (await there.client.files.content(file_id)).text
    found = [json.loads(line) for line in text.splitlines()]
    by_id = {line["custom_id"]: line for line in found}
    assert len(by_id) == len(found)
    return by_id
