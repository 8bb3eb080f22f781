"""Loads of transformers models: one at a time in a process, without the progress bars of the library."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

_ONE_AT_A_TIME: Final = threading.RLock()


@contextmanager
def model_loading() -> Iterator[None]:
    """Enter it around every `from_pretrained` that builds a model; other threads wait meanwhile.

    While it builds a model, `from_pretrained` replaces functions of transformers and the default dtype of torch for
    the whole process, and puts back what it found. If two loads overlap, the second finds what the first has put
    there, and leaves it for good: no model that is loaded later has its head tied to its embedding.
    """
    with _ONE_AT_A_TIME, quiet_progress():
        yield


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Hide the progress bars of transformers: the caller shows its own progress."""
    from transformers.utils import logging as module

    logging: Any = module
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
