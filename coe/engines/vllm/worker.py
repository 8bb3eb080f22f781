"""What vLLM's worker process imports: it must end with the process that started it.

vLLM's engine process does not notice that its parent was killed, and would keep its memory. vLLM imports the class
named by `worker_extension_cls` before it loads a model, so the watch begins here, at the import. Light imports only.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading


class WorkerExtension:
    """Adds no methods to vLLM's worker yet."""


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _watch_parent() -> None:
    """In a child process: end when the parent ends; and log no inputs of requests when the engine fails."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    threading.Thread(target=_end_with, args=(parent,), name="coe-watch-parent", daemon=True).start()
    logging.getLogger("vllm.logging_utils.dump_input").disabled = True


_watch_parent()
