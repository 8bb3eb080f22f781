"""What reaches the terminal of logs and warnings: those of this project, as one line each; of libraries, nothing.

A retry or a slow start is the business of the library that logs it. COE_LOG=info (or warning, debug) shows every log.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO

from rich.markup import escape

from coe.cli.output import console
from coe.telemetry.json_logs import OURS, use_json, writes_json

_INSTALLED = ("site-packages", "dist-packages")


class _Notices(logging.Handler):
    """Prints a record as a notice for people, without time, place and traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        _print(record.getMessage())


def quiet_libraries() -> None:
    """Set this up for the process of a command, before libraries are imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if level := os.environ.get("COE_LOG", "").strip():
        logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        return
    if not any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger().handlers):
        logging.getLogger().addHandler(logging.NullHandler())  # else Python prints warnings of any logger
    for name in OURS:
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Notices) for handler in logger.handlers):
            logger.addHandler(_Notices(logging.WARNING))
    warnings.showwarning = _show_warning


def json_lines() -> None:
    """Write what reaches stderr as JSON lines from now on, status lines of `coe serve` included."""
    root = logging.getLogger()
    if os.environ.get("COE_LOG", "").strip():
        use_json(root.handlers)
        logging.captureWarnings(True)
        return
    terminal = logging.StreamHandler()
    use_json([terminal])
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [terminal], False
        logger.setLevel(logging.INFO)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if not any(part in filename for part in _INSTALLED):
        _print(str(message))


def _print(text: str) -> None:
    if writes_json():
        logging.getLogger("coe").warning("%s", text)
        return
    console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)
