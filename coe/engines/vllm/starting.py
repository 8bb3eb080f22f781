"""Starts vLLM's engine process off the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coe.engines.vllm.options import Options
from coe.engines.vllm.process import start, stop


async def start_in_thread(name: str, path: Path, options: Options, check: Callable[[], None] | None = None) -> Any:
    """An AsyncLLM whose process is ready; see `start`. Cancelled, it leaves no process behind."""
    starting = asyncio.ensure_future(asyncio.to_thread(start, name, path, options, check))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        starting.add_done_callback(_stop_started)  # the thread goes on
        raise


def _stop_started(starting: asyncio.Future[Any]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        threading.Thread(target=stop, args=(starting.result(),), name="vllm-stop").start()
