"""Ctrl-C and SIGTERM: both end a command alike, with what to type to go on, and exit status 130 or 143.

Signals belong to the process, so this module keeps what it saw of them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Final

import typer

from coe.cli.output import console

BY_CTRL_C = 128 + signal.SIGINT
_BY_SIGTERM = 128 + signal.SIGTERM
_AGAIN_S: Final = 0.05
"""Seconds until a signal whose exception was lost is sent again."""


@dataclass(slots=True)
class _Seen:
    sigterm: bool = False
    printed: bool = False
    ended: bool = False
    report: Callable[[sys.UnraisableHookArgs], object] = sys.__unraisablehook__


_seen = _Seen()


def watch_signals() -> None:
    """From now on, SIGTERM does what Ctrl-C does: `KeyboardInterrupt`, or the cancellation of an asyncio program."""
    _seen.sigterm = _seen.printed = _seen.ended = False
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job ignores Ctrl-C, and a blocked signal is ignored too; but asyncio then installs its
        # handler, through which SIGTERM cancels a program in order.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    _watch_finalizers()


def finalizers_are_silent() -> None:
    """From now on nothing is printed of finalizers: an interrupt may have left objects that are half made."""
    _seen.ended = True


def _watch_finalizers() -> None:
    if sys.unraisablehook is not _unraisable:
        _seen.report = sys.unraisablehook
        sys.unraisablehook = _unraisable


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    """Send a signal again whose `KeyboardInterrupt` Python ignores: finalizers and callbacks of imports lose it."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        if not _seen.ended:
            _seen.report(lost)
    elif not sys.is_finalizing():
        number = signal.SIGTERM if _seen.sigterm else signal.SIGINT
        again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()


def _interrupt(_: int, frame: FrameType | None) -> None:
    _seen.sigterm = True
    handler = signal.getsignal(signal.SIGINT)  # asyncio has its own while a program runs
    if callable(handler):
        handler(signal.SIGINT, frame)
    else:
        raise KeyboardInterrupt


def interrupted(kept: str = "", resume: str | None = None) -> typer.Exit:
    """Print that the command was interrupted; raise what is returned.

    Args:
        kept: what is kept of the work. resume: the command that goes on with it.
    """
    _seen.printed = True
    console.print(f"\n[yellow]interrupted[/]{': ' if kept else ''}{kept}", highlight=False, soft_wrap=True)
    if resume is not None:
        console.print(f"To go on:\n  {resume}", highlight=False, markup=False, soft_wrap=True)
    return typer.Exit(exit_status())


def exit_status() -> int:
    """128 + the number of the signal, as shells have it."""
    return _BY_SIGTERM if _seen.sigterm else BY_CTRL_C


def status_of(status: str | int | None) -> str | int | None:
    """The exit status of a command that ended with `status`; prints what an interrupted one has not printed."""
    if status != BY_CTRL_C:
        return status
    return status if _seen.printed else interrupted().exit_code
