"""Translates what third-party code raises: engines, chat templates, endpoints, compositions, plug-ins.

    with seam("sql"):
        await engine.load(...)

The result is a `CoeError` that follows the rule of failure (`coe.errors`), and that another process can read.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

import coe.errors
from coe.errors import CoeError, EngineError, OutOfMemory, Rejected, Scope, WeightsError
from registry.errors import RegistryError

MOST_CHARACTERS: Final = 2000
"""Most characters of a third-party message; the log has its traceback."""
MOST_PUBLIC_CHARACTERS: Final = 500
"""Most characters of an error in the notes of an answer."""
_CONTROL: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
_DIRECTIONS: Final = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Unicode categories and bidirectional controls that a message must not contain: terminals and logs act on them."""
_ESCAPED: Final = {n: f"\\x{n:02x}" for n in (*range(0x20), *range(0x7F, 0xA0)) if chr(n) not in "\t\n"}
"""Control characters -> how `visible` shows them."""
_STATED: Final = ("scope", "status", "code", "retryable", "lasting", "internal", "public", "retry_after_s")
logger = logging.getLogger(__name__)


def is_interrupt(error: BaseException) -> bool:
    """Whether an exception is no failure: this task is cancelled, its coroutine is closed, or the user pressed Ctrl-C.

    A CancelledError that the called code raises by itself, while this task is not cancelled, is a failure.
    """
    if isinstance(error, asyncio.CancelledError):
        try:
            task = asyncio.current_task()
        except RuntimeError:  # no event loop
            return False
        return task is None or task.cancelling() > 0
    return isinstance(error, KeyboardInterrupt | GeneratorExit)


def text_of(error: BaseException, most: int = MOST_CHARACTERS) -> str:
    """The message of any exception on one line; its class if it has none. Never raises."""
    try:
        text = str(error)
    except BaseException as failure:  # `__str__` is third-party code too
        if is_interrupt(failure):
            raise
        text = ""
    return one_line(text, most) or type(error).__name__


def one_line(text: str, most: int) -> str:
    """A text as one line of at most `most` characters, without control characters and escape sequences."""
    beginning = " ".join(text[: 4 * most].split())
    if not beginning.isprintable():
        beginning = "".join("?" if _acts(each) else each for each in beginning)
    return beginning if len(beginning) <= most and len(text) <= 4 * most else beginning[: most - 3] + "..."


def visible(text: str) -> str:
    """A text with its lines, and its control characters as escapes, on which no terminal acts."""
    return text.translate(_ESCAPED)


def _acts(character: str) -> bool:
    return character in _DIRECTIONS or unicodedata.category(character) in _CONTROL


def scope_of(error: BaseException) -> Scope:
    """The scope of any exception: what is not ours is about the expert that raised it."""
    return error.scope if isinstance(error, CoeError) else Scope.EXPERT


def expert_error(expert: str, error: BaseException) -> CoeError:
    """The error of an expert whose engine raised `error`. Never of scope REQUEST: another expert may answer.

    What is no CoeError is logged with its traceback, since clients get only its class.
    """
    error = _only_one(error)
    if isinstance(error, CoeError):
        return portable(_rejected(error) if error.scope is Scope.REQUEST else error)
    logger.error("expert %r failed: %s: %s", expert, type(error).__name__, text_of(error), exc_info=error)
    if isinstance(error, RegistryError):
        return WeightsError(f"{expert!r} cannot be loaded: {text_of(error)}")
    if isinstance(error, MemoryError):
        return OutOfMemory(f"{expert!r} failed: memory ran out")
    kind = type(error).__name__
    text = text_of(error)
    return EngineError(
        f"{expert!r} failed: {kind}" + ("" if text == kind else f": {text}"), public=f"{expert!r} failed: {kind}"
    )


@contextmanager
def seam(expert: str) -> Iterator[None]:
    """Raise the error of the expert for what its engine raises in the block."""
    try:
        yield
    except BaseException as error:
        raise_as_of(expert, error)


def raise_as_of(expert: str, error: BaseException) -> NoReturn:
    """Raise the error of the expert for `error`, an interrupt unchanged. The log gets what clients do not read."""
    if is_interrupt(error):
        raise error
    failure = expert_error(expert, error)
    if failure is not error:
        raise failure from error
    if failure.internal or failure.public is not None:
        logger.warning("expert %r failed: %s", expert, text_of(failure))
    raise failure


def portable(error: CoeError) -> CoeError:
    """The error itself if another process can read it, else one of the nearest class of `coe.errors`."""
    if type(error).__module__.startswith("coe.") and _survives(error):
        return error
    kind: Any = next(kind for kind in type(error).__mro__ if kind.__module__ == coe.errors.__name__)
    again: CoeError = kind.__new__(kind)
    again.args = (text_of(error),)
    stated = {name: getattr(error, name) for name in _STATED if getattr(error, name) != getattr(kind, name)}
    vars(again).update({name: each for name, each in (vars(error) | stated).items() if _is_plain(each)})
    again.__cause__ = error.__cause__
    return again


def _only_one(error: BaseException) -> BaseException:
    """The exception inside groups of one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _rejected(error: CoeError) -> Rejected:
    rejected = Rejected(text_of(error), status=error.status, code=error.code, public=error.public)
    rejected.__cause__ = error
    return rejected


def _survives(error: CoeError) -> bool:
    try:
        str(error)
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # pickle calls the methods of the class
        return False


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def public_text(error: Exception) -> str:
    """An error as a client may see it, on one line; only its class if the message has internals of the server."""
    kind = type(error).__name__
    text = error.client_text if isinstance(error, CoeError) else None
    return kind if text is None else f"{kind}: {one_line(text, MOST_PUBLIC_CHARACTERS)}"
