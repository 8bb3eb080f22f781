"""The decision log: one line per finished request, written by each gateway and read back in order.

A separate thread writes the lines, so requests never wait for the disk. Lines that cannot be written (full disk, lost
folder, slow disk) are dropped and counted, and the service continues.

Files are `decisions-<UTC start of the process>-<process>-<number>.jsonl`, so files sort by name. The newest `keep`
files of each running process are kept, and the newest `keep` files of all ended processes together, so restarts do not
fill the disk. A process locks the file it writes; a process whose newest file is not locked has ended.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Final

from coe.config import DecisionLogConfig
from coe.serve.decisions.entry import DecisionLogError, Entry, decode, encode, is_cut
from coe.serve.http.finished import Finished

_PATTERN: Final = "decisions-*.jsonl"
_PENDING_BYTES: Final = 32 * 2**20
"""Most lines queued for the disk; more are dropped."""
_GATHER_S: Final = 0.01
"""Seconds in which lines gather before they are written: a thread that wakes for every request slows the event loop."""
log = logging.getLogger(__name__)


class DecisionLog:
    """Writes decisions. Never blocks its caller on the disk and never raises.

    Args:
        config: its folder must not be None.
        process: name of this process in file names, unique among processes that write into the folder.
    """

    def __init__(
        self, config: DecisionLogConfig, *, process: str | None = None, pending_bytes: int = _PENDING_BYTES
    ) -> None:
        assert config.folder is not None  # no folder, no log
        self._texts, self._most_pending_bytes = config.texts, pending_bytes
        self._files = RotatingFiles(config.folder, process or str(os.getpid()), config.max_bytes, config.keep)
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._pending_bytes = 0
        self._closed = self._failing = False
        self.dropped = 0
        """Number of decisions lost since the start."""
        self._writer = threading.Thread(target=self._run, name="decision-log", daemon=True)
        self._writer.start()

    def write(self, finished: Finished) -> None:
        """Queue a finished request for the file."""
        # Encoded here: the queue is bounded in bytes, and a thread would take the interpreter's lock for as long.
        line = encode(finished, texts=self._texts)
        with self._changed:
            if self._closed:
                self.dropped += 1
            elif self._pending_bytes + len(line) > self._most_pending_bytes:
                self._drop("the disk does not keep up")
            else:
                self._lines.append(line)
                self._pending_bytes += len(line)
                if len(self._lines) == 1:
                    self._changed.notify()

    def close(self, timeout_s: float = 5.0) -> None:
        """Write pending lines. Lines that the disk has not taken after `timeout_s` seconds are lost and reported."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._writer.join(timeout_s)
        with self._changed:
            if self._writer.is_alive():
                self.dropped += len(self._lines) + 1  # one is being written
                log.error("decision log: the disk did not respond for %g s; %d decisions lost", timeout_s, self.dropped)
                self._lines.clear()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._lines:
                    self._changed.wait_for(lambda: self._lines or self._closed)
                    self._changed.wait_for(lambda: self._closed, _GATHER_S)
                if not self._lines:
                    break
                line = self._lines.popleft()
            error = _failure(partial(self._files.append, line))
            with self._changed:
                self._pending_bytes -= len(line)
                if error is not None:
                    self._drop(str(error))
                elif self._failing and not self._lines:
                    self._failing = False
                    log.warning("decision log: writing again; %d decisions dropped so far", self.dropped)
        if (error := _failure(self._files.close)) is not None:
            log.error("decision log: %s", error)

    def _drop(self, why: str) -> None:
        """Count a lost line, and log the first of an outage. Called under the lock."""
        self.dropped += 1
        if not self._failing:
            self._failing = True
            log.error("decision log: %s; decisions are dropped until they can be written again", why)


class RotatingFiles:
    """Appends whole lines to files of at most `max_bytes`, and removes old files. Blocks on the disk.

    A line longer than `max_bytes` gets its own file. Files are readable by their owner only, since they may hold texts.
    """

    def __init__(self, folder: Path, process: str, max_bytes: int, keep: int) -> None:
        started = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        self._folder, self._stem = folder, f"decisions-{started}-{process}-"
        self._max_bytes, self._keep = max_bytes, keep
        self._number = self._size = 0
        self._descriptor: int | None = None

    def append(self, line: bytes) -> None:
        """Append a line. On OSError nothing of the line remains."""
        if self._descriptor is not None and self._is_lost(self._descriptor):
            os.close(self._descriptor)  # a removed file accepts lines and keeps none
            self._descriptor = None
        if self._descriptor is None or (self._size and self._size + len(line) > self._max_bytes):
            self._descriptor = self._next_file()
            self._remove_old()
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            self._cut_back(self._descriptor)
            raise
        self._size += len(line)

    def close(self) -> None:
        """Sync and close the current file."""
        if self._descriptor is not None:
            try:
                os.fsync(self._descriptor)
            finally:
                os.close(self._descriptor)
                self._descriptor = None

    def _cut_back(self, descriptor: int) -> None:
        """Remove a partial line; if that fails, make it the last of its file."""
        try:
            os.ftruncate(descriptor, self._size)
        except OSError:
            self._descriptor = None
            os.close(descriptor)

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._stem}{number:06}.jsonl"

    def _is_lost(self, descriptor: int) -> bool:
        try:
            return not os.path.samestat(os.fstat(descriptor), self._path(self._number).stat())
        except FileNotFoundError:
            return True

    def _next_file(self) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(self._number + 1)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        with suppress(OSError):  # no locks on this file system: other processes may treat our old files as ended
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._number, self._size = self._number + 1, 0
        return descriptor

    def _remove_old(self) -> None:
        ended: list[Path] = []
        for stem, files in groupby(sorted(self._folder.glob(_PATTERN)), key=lambda path: path.name.rpartition("-")[0]):
            paths = list(files)
            if self._stem == f"{stem}-":
                _remove(paths[: -self._keep])
            elif not _is_locked(paths[-1]):
                ended += paths
        _remove(ended[: -self._keep])


def read_log(paths: Iterable[Path], on_cut: Callable[[str], None]) -> Iterator[Entry]:
    """The entries of files, in the order given; files of a folder are ordered by the start of their process.

    Reads one line at a time. An incomplete last line, as a killed process leaves it, is skipped; `on_cut` gets its
    place.

    Raises:
        DecisionLogError: a file is missing, not a decision log or of another format, or a line before the last is
            damaged; names file and line.
    """
    for file in [file for path in paths for file in _files(path)]:
        yield from _read_file(file, on_cut)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob(_PATTERN))
    if not files:
        raise DecisionLogError(f"{path}: contains no decision log (no files {_PATTERN})")
    return files


def _read_file(path: Path, on_cut: Callable[[str], None]) -> Iterator[Entry]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                place = f"{path}:{number}"
                if is_cut(line):
                    on_cut(place)
                else:
                    yield decode(line, place)
    except FileNotFoundError:
        raise DecisionLogError(f"{path}: no such file") from None
    except OSError as error:
        raise DecisionLogError(f"{path}: cannot be read: {error}") from error


def _failure(write: Callable[[], None]) -> OSError | None:
    try:
        write()
    except OSError as error:
        return error
    return None


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)  # another process may remove it too
        except OSError as error:
            log.warning("decision log: an old file cannot be removed: %s", error)
